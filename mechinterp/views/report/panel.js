// What the panel beside the graph says about a node or an edge. Texts are set as texts, never as markup.

class Panel {
  constructor(place, graph, details) {
    this.place = place;
    this.graph = graph;
    this.details = details;
    this.prompt = 0;
    this.again = () => {};
  }

  show(...children) {
    this.place.replaceChildren(...children.flat().filter((child) => child));
    this.place.scrollTop = 0;
  }

  summary(stop) {
    this.again = () => this.summary(stop);
    const hint = "Point at a node or an edge; click a node to see only the paths through it. Click again, or press Escape, for everything.";
    this.show(
      element("h3", {}, `${count(stop.n_edges, "edge")}, ${count(stop.n_nodes, "node")}`),
      element("p", { class: "note" }, hint),
    );
  }

  edge(i) {
    this.again = () => this.edge(i);
    const [from, to, channel, name, score] = this.graph.edges[i];
    const meaning = score === null ? "" : score < 0 ? "works against the task" : score > 0 ? "helps the task" : "";
    this.show(
      element("h3", {}, name),
      facts([
        ["score", score === null ? "none in the file" : `${signed(score)}${meaning && ` (${meaning})`}`],
        ["from", this.graph.nodes[from].name],
        ["to", this.graph.nodes[to].name],
        ["into", this.graph.channels[channel][0].replace("into ", "")],
      ]),
    );
  }

  node(i, edges, isolated) {
    this.again = () => this.node(i, edges, isolated);
    const node = this.graph.nodes[i], role = this.graph.roles[node.role];
    const into = edges.filter((e) => this.graph.edges[e][1] === i), out = edges.filter((e) => this.graph.edges[e][0] === i);
    // A line to each head of a group is one edge that leaves its writer once.
    const leaving = new Map(out.map((e) => [this.graph.edges[e][3], this.graph.edges[e][4]]));
    const scores = [...leaving.values()];
    const total = this.graph.level === "node" ? scores[0] : scores.reduce((sum, score) => sum + score, 0);
    const rows = [["role", role ? role.label : `none stated (${node.what})`]];
    if (this.graph.scored && scores.length) rows.push([this.graph.level === "node" ? "score" : "score, its edges summed", signed(total)]);
    rows.push(this.graph.level === "node" ? ["neighbours", `${into.length} in, ${out.length} out`] : ["edges", `${into.length} in, ${leaving.size} out`]);
    const direct = this.details.direct[node.bare];
    if (direct !== undefined) rows.push(["direct effect", `${signed(direct)} ${this.details.unit} (mean of ${this.details.n_direct})`]);
    if (this.details.tokens?.[node.bare]) rows.push(["raises most", this.details.tokens[node.bare]]);
    if (this.details.fires?.[node.bare]) rows.push(["most active at", this.details.fires[node.bare]]);
    this.show(
      element("h3", {}, node.name),
      role?.description ? element("p", { class: "note" }, role.description) : null,
      facts(rows),
      isolated ? element("p", { class: "note" }, "Only the paths through it are shown; Escape shows everything.") : null,
      this.measured(node),
    );
  }

  // The attention pattern and the tokens written, on the chosen prompt.
  measured(node) {
    const prompts = this.details.prompts;
    const has = (prompt) => prompt.patterns[node.bare] || prompt.written[node.bare];
    if (!prompts.some(has)) {
      const could = ["head", "mlp", "neuron"].includes(node.kind);
      return could ? [element("p", { class: "note" }, "Attention pattern and written tokens were not measured; the notes below the graph say why.")] : [];
    }
    const prompt = prompts[this.prompt], pattern = prompt.patterns[node.bare], written = prompt.written[node.bare];
    const choose = element("select", { "aria-label": "Prompt" }, ...prompts.map((one, k) =>
      element("option", { value: k, ...(k === this.prompt ? { selected: "" } : {}) }, `prompt ${one.row + 1} of ${this.details.n_examples} (${this.details.pairs})`)));
    choose.addEventListener("change", () => {
      this.prompt = Number(choose.value);
      this.again();
    });
    const words = prompt.tokens.map((token, k) => element("span", k === prompt.answer_pos ? { class: "answer", title: "answer position" } : {}, token.replace(/^␣/, "")));
    const answers = [prompt.right.length ? `right: ${prompt.right.join(", ")}` : "", prompt.wrong.length ? `wrong: ${prompt.wrong.join(", ")}` : ""];
    const notes = [...answers.filter(Boolean)];
    if (node.position && pattern) notes.push("the pattern is of the whole head, at every position");
    if (node.position && node.position !== this.graph.answers) notes.push(`what it writes is shown at the answer position, not at ${node.position}`);
    return [
      element("p", { class: "prompt" }, choose),
      element("p", { class: "prompt" }, ...words),
      element("p", { class: "note" }, notes.join("; ")),
      ...(pattern ? patternOf(pattern, prompt, node.bare) : []),
      ...(written ? writtenOf(written) : []),
    ];
  }
}

function facts(rows) {
  return element("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function patternOf(rows, prompt, name) {
  const n = prompt.tokens.length, value = (q, k) => (rows[q]?.[k] ?? 0) / 1000;
  const gutter = 62, cell = Math.max(4, Math.min(16, Math.floor((308 - gutter) / n))), side = n * cell;
  const scale = window.devicePixelRatio || 1, wide = gutter + side, high = gutter + side;
  const row = prompt.tokens.map((_, k) => [value(prompt.answer_pos, k), k]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const most = "At the answer position it attends to " + row.map(([v, k]) => `${prompt.tokens[k]} (${k}) ${v.toFixed(2)}`).join(", ");
  const canvas = element("canvas", { width: wide * scale, height: high * scale, class: "pattern", role: "img", "aria-label": `Attention pattern of ${name}. ${most}` });
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  const pen = canvas.getContext("2d"), look = getComputedStyle(document.documentElement);
  pen.scale(scale, scale);
  pen.fillStyle = look.getPropertyValue("--cell");
  pen.fillRect(gutter, gutter, side, side);
  pen.fillStyle = look.getPropertyValue("--accent");
  for (let q = 0; q < n; q++) {
    for (let k = 0; k < n; k++) {
      pen.globalAlpha = value(q, k);
      if (pen.globalAlpha) pen.fillRect(gutter + k * cell, gutter + q * cell, cell - (cell > 6 ? 1 : 0), cell - (cell > 6 ? 1 : 0));
    }
  }
  pen.globalAlpha = 1;
  pen.fillStyle = look.getPropertyValue("--soft");
  pen.font = `${Math.min(11, Math.max(8, cell - 1))}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  const every = cell >= 8 ? 1 : Math.ceil(8 / cell);
  const short = (token) => (token.length > 9 ? `${token.slice(0, 8)}…` : token);
  for (let k = 0; k < n; k += every) {
    pen.textAlign = "right";
    pen.fillText(short(prompt.tokens[k]), gutter - 4, gutter + (k + 0.5) * cell);
    pen.save();
    pen.translate(gutter + (k + 0.5) * cell, gutter - 4);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(short(prompt.tokens[k]), 0, 0);
    pen.restore();
  }
  pen.strokeStyle = look.getPropertyValue("--ink");
  pen.lineWidth = 1;
  pen.strokeRect(gutter + 0.5, gutter + prompt.answer_pos * cell - 0.5, side - 1, cell);
  const usual = `${most}. Rows are queries, columns keys; the frame is the answer position.`;
  const says = element("p", { class: "note readout" }, usual);
  canvas.addEventListener("pointermove", (event) => {
    const k = Math.floor((event.offsetX - gutter) / cell), q = Math.floor((event.offsetY - gutter) / cell);
    const inside = k >= 0 && q >= 0 && k < n && q < n;
    says.textContent = inside ? `${prompt.tokens[q]} (${q}) attends to ${prompt.tokens[k]} (${k}): ${value(q, k).toFixed(3)}` : usual;
  });
  canvas.addEventListener("pointerleave", () => { says.textContent = usual; });
  return [element("h4", {}, "Attention pattern"), canvas, says];
}

function writtenOf([raised, lowered]) {
  const cell = (pair) => (pair ? [element("td", { class: "token" }, pair[0]), element("td", { class: "number" }, signed(pair[1]))] : [element("td"), element("td")]);
  const rows = raised.map((pair, k) => element("tr", {}, ...cell(pair), ...cell(lowered[k])));
  const head = element("tr", {}, element("th", { colspan: 2 }, "raises most"), element("th", { colspan: 2 }, "lowers most"));
  return [element("h4", {}, "Writes at the answer position (logits)"), element("table", { class: "written" }, element("thead", {}, head), element("tbody", {}, ...rows))];
}
