// The diagram of roles or layers: boxes of nodes in columns (positions) and rows, arrows between them. A click opens a box.

const PILL = 20, BOX_GAP = 22, LEVEL_GAP = 76, LINE = 16, MAX_LETTERS = 24, SHOWN_PILLS = 6, LABELLED = 12, MAX_OPENED = 80;

class Diagram {
  constructor(place, panel, graph, data, edges) {
    Object.assign(this, { place, panel, graph, data, edges });
    this.opened = new Set();
    this.plain = data.plain;
    this.index = new Map(graph.nodes.map((node, i) => [node.name, i]));
    this.boxOf = new Map(data.boxes.flatMap((box, b) => box.nodes.map((name) => [this.index.get(name), b])));
    this.watch();
  }

  size(arrow) {
    return this.data.claimed ? 0.2 : this.data.weights === "scores" ? Math.abs(arrow.weight ?? 0) : arrow.n;
  }

  // -- arrows: between boxes, or to and from the single nodes of opened boxes

  arrows() {
    this.largest = Math.max(...this.data.arrows.filter((arrow) => arrow.main && arrow.from !== arrow.to && this.shows(arrow.from) && this.shows(arrow.to)).map((arrow) => this.size(arrow)), 1e-12);
    const { data, opened } = this, visible = (arrow) => this.shows(arrow.from) && this.shows(arrow.to);
    const whole = data.arrows.filter((arrow) => arrow.main && arrow.from !== arrow.to && visible(arrow) && !opened.has(arrow.from) && !opened.has(arrow.to));
    const found = whole.map((arrow) => ({ ...arrow, source: `b${arrow.from}`, target: `b${arrow.to}` }));
    if (!opened.size) return found;
    if (data.claimed) return found.concat(data.arrows.filter((arrow) => visible(arrow) && (opened.has(arrow.from) || opened.has(arrow.to))).flatMap((arrow) => this.ofNodes(arrow)));
    const single = new Map();
    for (const e of this.edges()) {
      const [i, j, channel, name, score] = this.graph.edges[e], from = this.boxOf.get(i), to = this.boxOf.get(j);
      if (!opened.has(from) && !opened.has(to)) continue;
      if (!this.shows(from) || !this.shows(to)) continue;
      const like = data.arrows.find((arrow) => arrow.from === from && arrow.to === to && arrow.inputs.includes(channel));
      const at = data.boxes[from].kind === "input" ? this.graph.nodes[i].position || (like?.at ?? "") : "";
      const source = opened.has(from) ? `n${i}` : `b${from}`, target = opened.has(to) ? `n${j}` : `b${to}`, key = `${source}>${target}:${channel}:${at}`;
      const arrow = single.get(key) ?? { from, to, source, target, inputs: [channel], at, weight: null, n: 0, names: new Set(), note: "" };
      single.set(key, arrow);
      if (arrow.names.has(name)) continue;
      arrow.names.add(name);
      arrow.n += 1;
      if (this.data.weights === "scores") arrow.weight = (arrow.weight ?? 0) + score;
    }
    return found.concat([...single.values()].sort((a, b) => this.size(b) - this.size(a)).slice(0, MAX_OPENED));
  }

  // A stated arrow for each node of the opened boxes at its ends that has an edge to the other end.
  ofNodes(arrow) {
    const lines = this.between(arrow), single = new Map();
    for (const e of lines) {
      const [i, j, , name] = this.graph.edges[e], source = this.opened.has(arrow.from) ? `n${i}` : `b${arrow.from}`, target = this.opened.has(arrow.to) ? `n${j}` : `b${arrow.to}`, key = `${source}>${target}`;
      const one = single.get(key) ?? { ...arrow, source, target, n: 0, names: new Set() };
      single.set(key, one);
      one.names.add(name);
      one.n = one.names.size;
    }
    return [...single.values()];
  }

  shows(b) {
    return this.plain || this.data.boxes[b].kind !== "plain";
  }

  // -- places

  render() {
    const { data } = this, drawn = data.boxes.map((box, b) => ({ box, b })).filter(({ b, box }) => this.shows(b) && box.kind !== "input");
    const sized = drawn.map(({ box, b }) => ({ ...this.sized(box, b), box, b }));
    const columns = [...data.columns];
    if (!columns.length || (data.by === "roles" && this.plain && columns[0].name)) columns.unshift({ name: "", token: "" });
    const of = (entry) => Math.max(0, columns.findIndex((column) => column.name === entry.box.column));
    const used = [...new Set(sized.map((entry) => entry.box.level))].sort((a, b) => a - b);
    const cells = used.map((level) => columns.map((_, c) => sized.filter((entry) => entry.box.level === level && of(entry) === c)));
    const across = (list) => list.reduce((sum, entry) => sum + entry.width, 0) + BOX_GAP * Math.max(0, list.length - 1);
    const widths = columns.map((column, c) => Math.max(78, 8 * Math.max(column.name.length, column.token.length) + 24, ...cells.map((row) => across(row[c]))) + BOX_GAP + 6);
    const natural = widths.reduce((a, b) => a + b, 0), room = this.place.clientWidth - 4, spare = Math.max(0, room - natural) / columns.length;
    const width = natural + spare * columns.length, middles = [];
    let left = 0;
    for (const w of widths) {
      middles.push(left + (w + spare) / 2);
      left += w + spare;
    }
    const gap = data.by === "layers" ? 46 : LEVEL_GAP, bands = [], tall = cells.map((row) => Math.max(...row.flat().map((entry) => entry.height)));
    let y = 14 + gap * used.length + tall.reduce((a, b) => a + b, 0);
    const bottom = y + 30, height = bottom + 26;
    cells.forEach((row, k) => {
      y -= gap;
      const top = y - tall[k];
      row.forEach((list, c) => {
        let x = middles[c] - across(list) / 2;
        for (const entry of list) {
          Object.assign(entry, { x: x + entry.width / 2, top: top + (tall[k] - entry.height) / 2, column: c });
          x += entry.width + BOX_GAP;
        }
      });
      bands.push({ level: used[k], top, bottom: y, taken: row.flat().map((entry) => [entry.x - entry.width / 2 - 7, entry.x + entry.width / 2 + 7]), passed: [] });
      y = top;
    });
    this.scale = Math.max(0.64, Math.min(1, room / width));
    Object.assign(this, { width, height, middles, columns, bottom, bands, entries: sized });
    this.draw();
  }

  // The size of a box with its label in lines and its nodes as pills.
  sized(box, b) {
    const open = this.opened.has(b), per = open ? (box.kind === "layers" ? 9 : 4) : 3, label = box.kind === "layers" ? `${box.label} (${box.nodes.length})` : box.label;
    const lines = wrapped(label, box.kind === "layers" ? 40 : MAX_LETTERS);
    const names = box.kind === "logits" || (box.kind === "layers" && !open) ? [] : box.nodes.filter((name) => this.index.has(name)), shown = open ? names : names.slice(0, names.length > SHOWN_PILLS ? SHOWN_PILLS - 1 : SHOWN_PILLS);
    const labels = shown.map((name) => (name.endsWith(`@${box.column}`) ? name.slice(0, -box.column.length - 1) : name)), gap = open ? 12 : 5;
    const wide = Math.max(30, ...labels.map((label) => 6.6 * label.length + 12)), rows = Math.ceil((labels.length + (shown.length < names.length ? 1 : 0)) / per);
    const inner = Math.min(per, Math.max(1, labels.length + (shown.length < names.length ? 1 : 0))) * (wide + gap) - gap;
    const width = Math.max(70, Math.max(...lines.map((line) => 7.4 * line.length)), names.length ? inner : 0) + 20;
    return { lines, shown, labels, rest: names.length - shown.length, open, per, gap, wide, width, height: 12 + LINE * lines.length + rows * (PILL + gap) + (rows ? 3 : 0) };
  }

  // -- drawing

  draw() {
    const { width, height, data } = this;
    this.lines = shape("g", { class: "arrows" });
    const back = shape("g", { class: "columns", "aria-hidden": "true" }), boxes = shape("g"), named = data.by === "roles";
    this.columns.forEach((column, c) => {
      back.append(shape("line", { x1: this.middles[c], x2: this.middles[c], y1: 6, y2: this.bottom - 30 }));
      const label = column.name ? column.token && column.name : this.columns.length > 1 && named ? "no stated position" : "";
      if (label) back.append(shape("text", { x: this.middles[c], y: this.bottom + 18, "text-anchor": "middle", class: column.name ? "column" : "" }, label));
    });
    this.ends = new Map();
    this.entries.forEach((entry) => boxes.append(this.box(entry)));
    const input = data.boxes.findIndex((box) => box.kind === "input");
    const place = (c, x, label, wide) => {
      boxes.append(shape("g", { class: "box input", transform: `translate(${x} ${this.bottom - 14})`, "data-box": input },
        shape("rect", { x: -wide / 2, y: -12, width: wide, height: 24, rx: 3, fill: data.boxes[input].colour }),
        shape("text", { y: 4, "text-anchor": "middle", fill: "#ffffff" }, label)));
      this.ends.set(`i${c}`, { x, width: wide, top: this.bottom - 26, bottom: this.bottom, level: 0 });
    };
    if (input >= 0 && named) this.columns.forEach((column, c) => place(column.name, this.middles[c], column.token.replace(/^␣/, "") || column.name || "input", Math.max(56, 8 * (column.token || column.name || "input").length + 16)));
    else if (input >= 0) place("", width / 2, "input", width * 0.6);
    const svg = shape("svg", { viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, width: Math.round(width * this.scale), height: Math.round(height * this.scale), class: "diagram", role: "group", "aria-label": `The circuit by ${data.by}; Enter opens a box` }, back, this.lines, boxes);
    this.drawArrows();
    this.place.replaceChildren(svg);
  }

  box(entry) {
    const { box, b, x, top, width, height, lines, open } = entry, left = x - width / 2;
    const group = shape("g", { class: `box ${box.kind}${open ? " open" : ""}`, "data-box": b },
      shape("rect", { x: left, y: top, width, height, rx: 8, class: "ground" }),
      shape("rect", { x: left, y: top, width, height, rx: 8, fill: box.colour, "fill-opacity": 0.15, stroke: box.colour, "stroke-width": open ? 2.5 : 1.5, role: "button", tabindex: 0, "aria-expanded": open, "aria-label": `${box.label}, ${count(box.nodes.length, "node")}` }));
    lines.forEach((line, k) => group.append(shape("text", { x, y: top + 18 + LINE * k, "text-anchor": "middle", class: "title" }, line)));
    this.ends.set(`b${b}`, { x, width, top, bottom: top + height, level: box.level });
    const first = top + 14 + LINE * lines.length, each = entry.labels.length + (entry.rest ? 1 : 0), row = Math.min(entry.per, each);
    for (let k = 0; k < each; k++) {
      const here = Math.min(row, each - row * Math.floor(k / row)), cx = x + ((k % row) - (here - 1) / 2) * (entry.wide + entry.gap), cy = first + Math.floor(k / row) * (PILL + entry.gap);
      if (k === entry.labels.length) {
        group.append(shape("text", { x: cx, y: cy + 14, "text-anchor": "middle", class: "more" }, `+${entry.rest}`));
        continue;
      }
      const i = this.index.get(entry.shown[k]);
      group.append(shape("g", { class: "pill", "data-pill": i, role: "button", tabindex: open ? 0 : -1, "aria-label": entry.shown[k] },
        shape("rect", { x: cx - entry.wide / 2, y: cy, width: entry.wide, height: PILL, rx: 10, fill: box.colour }),
        shape("text", { x: cx, y: cy + 14, "text-anchor": "middle", fill: inkOn(box.colour) }, entry.labels[k])));
      this.ends.set(`n${i}`, { x: cx, width: entry.wide, top: cy, bottom: cy + PILL, level: box.level });
    }
    return group;
  }

  drawArrows() {
    const end = (name, at) => {
      const box = name[0] === "b" && this.data.boxes[Number(name.slice(1))];
      if (!box || box.kind !== "input") return this.ends.get(name);
      return this.ends.get(`i${at}`) ?? this.ends.get("i") ?? this.ends.get(`i${this.columns[0].name}`);
    };
    const list = this.arrows().map((arrow) => ({ ...arrow, a: end(arrow.source, arrow.at), b: end(arrow.target, "") })).filter((arrow) => arrow.a && arrow.b);
    // The ends along a side, in the order of where the arrows come from or go to.
    const spread = (key, other, side) => {
      const groups = new Map();
      for (const arrow of list) groups.set(arrow[key], [...(groups.get(arrow[key]) ?? []), arrow]);
      for (const [box, some] of groups) {
        const step = Math.min(32, (box.width * 0.84) / some.length);
        some.sort((p, q) => p[other].x - q[other].x || p.inputs[0].localeCompare(q.inputs[0])).forEach((arrow, k) => {
          arrow[side] = box.x + (k - (some.length - 1) / 2) * step;
          arrow.slot = k;
        });
      }
    };
    spread("a", "b", "x0");
    spread("b", "a", "x1");
    for (const band of this.bands) band.passed = [];
    list.sort((p, q) => this.size(q) - this.size(p));
    this.drawn = list;
    list.forEach((arrow, k) => this.drawArrow(arrow, k));
    this.lines.replaceChildren(...list.map((arrow) => arrow.path).reverse(), ...list.map((arrow) => arrow.words).filter(Boolean));
  }

  drawArrow(arrow, k) {
    const { a, b, x0, x1 } = arrow, y0 = a.top, y1 = b.bottom + 6, share = Math.min(1, this.size(arrow) / this.largest);
    let d;
    if (b.level > a.level && y1 < y0) {
      const knots = [[x0, y0]];
      for (const band of this.bands.filter((one) => one.level > a.level && one.level < b.level)) {
        const [xa, ya] = knots[knots.length - 1], [low, high] = [band.bottom + 8, band.top - 8];
        const straight = (y) => xa + ((x1 - xa) * (ya - y)) / (ya - y1), [left, right] = [straight(low), straight(high)].sort((p, q) => p - q);
        if (band.taken.every(([from, to]) => right <= from || left >= to)) knots.push([straight(low), low], [straight(high), high]);
        else {
          const x = free(band, straight((low + high) / 2));
          knots.push([x, low], [x, high]);
        }
      }
      knots.push([x1, y1]);
      d = `M${x0.toFixed(1)} ${y0.toFixed(1)}` + pieces(knots).map((curve) => `C${curve.slice(2).map((v) => v.toFixed(1)).join(" ")}`).join("");
    } else d = `M${x0.toFixed(1)} ${y0.toFixed(1)}C${x0.toFixed(1)} ${(y0 - 46).toFixed(1)} ${x1.toFixed(1)} ${(y1 + 46).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
    const width = this.data.claimed ? 1.8 : 1 + 6 * share, tip = 3.5 + width * 0.7, channel = this.graph.channels[arrow.inputs[0]] ?? this.graph.channels.several;
    const colour = arrow.inputs.length === 1 ? channel[1] : undefined, negative = (arrow.weight ?? 0) < 0;
    arrow.path = fill(document.createElementNS(SVG, "g"), { class: `arrow${negative ? " against" : ""}`, "data-arrow": k, opacity: (this.data.claimed ? 0.9 : 0.45 + 0.5 * share).toFixed(2) }, [
      shape("title", {}, this.words(arrow)),
      shape("path", { d, class: "touch" }),
      shape("path", { d, class: "line", stroke: colour, "stroke-width": width.toFixed(2), "stroke-dasharray": negative ? `${(4 + width).toFixed(1)} ${(3 + 0.6 * width).toFixed(1)}` : undefined }),
      shape("path", { d: `M${x1 - tip} ${y1 + 2}L${x1 + tip} ${y1 + 2}L${x1} ${y1 - 6}z`, class: "tip", fill: colour }),
    ]);
    const label = this.data.claimed ? (arrow.target[0] === "n" || arrow.source[0] === "n" ? "" : arrow.inputs[0] === "logits" || arrow.inputs[0] === "mlp" ? "" : arrow.inputs.join(", ")) : k < LABELLED && this.data.weights === "scores" ? signed(arrow.weight, 2) : "";
    arrow.words = label ? shape("text", { x: x1 + tip + 1, y: y1 + 13 + 11 * (arrow.slot % 2), class: "weight" }, label) : null;
  }

  words(arrow) {
    const name = (end, b) => (end[0] === "n" ? this.graph.nodes[Number(end.slice(1))].name : this.data.boxes[b].label);
    const into = arrow.inputs.map((input) => (this.graph.channels[input]?.[0] ?? "").replace("into ", "")).join(" and ");
    const at = arrow.at ? ` at ${arrow.at}` : "", weight = arrow.weight === null ? "" : `: ${signed(arrow.weight)} (${count(arrow.n, "edge")})`;
    const edges = arrow.weight === null ? `: ${count(arrow.n, "edge")}` : weight;
    return `${name(arrow.source ?? `b${arrow.from}`, arrow.from)}${at} -> ${name(arrow.target ?? `b${arrow.to}`, arrow.to)}, ${into}${edges}${arrow.note ? `; ${arrow.note}` : ""}`;
  }

  // -- what a reader does

  watch() {
    const at = (event, key) => event.target.closest?.(`[data-${key}]`);
    this.place.addEventListener("click", (event) => {
      const pill = at(event, "pill"), box = at(event, "box"), arrow = at(event, "arrow");
      if (pill) this.pick(Number(pill.dataset.pill));
      else if (box && this.data.boxes[Number(box.dataset.box)].kind !== "input") this.toggle(Number(box.dataset.box));
      else if (arrow) this.showArrow(this.drawn[Number(arrow.dataset.arrow)]);
      else {
        this.opened.clear();
        this.render();
        this.summary();
      }
    });
    this.place.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      const pill = at(event, "pill"), box = at(event, "box");
      if (pill) this.pick(Number(pill.dataset.pill));
      else if (box) {
        this.toggle(Number(box.dataset.box));
        this.place.querySelector(`[data-box="${box.dataset.box}"] [role=button]`)?.focus();
      }
      event.preventDefault();
    });
    this.place.addEventListener("pointerover", (event) => {
      if (event.pointerType === "touch") return;
      const box = at(event, "box"), arrow = at(event, "arrow");
      this.light(box ? Number(box.dataset.box) : null, arrow ? Number(arrow.dataset.arrow) : null);
    });
    this.place.addEventListener("pointerleave", () => this.light(null, null));
  }

  light(b, k) {
    const any = b !== null || k !== null;
    this.drawn.forEach((arrow, i) => {
      const on = k === i || (b !== null && (arrow.from === b || arrow.to === b));
      arrow.path.classList.toggle("faint", any && !on);
      arrow.words?.classList.toggle("faint", any && !on);
    });
    if (k !== null) this.showArrow(this.drawn[k]);
  }

  toggle(b) {
    if (this.opened.has(b)) this.opened.delete(b);
    else this.opened.add(b);
    this.render();
    this.showBox(b);
  }

  pick(i) {
    this.panel.node(i, this.edges(), false);
  }

  summary() {
    const { data } = this, [inside, total] = [data.inside, data.total], kinds = new Set(data.boxes.map((box) => box.kind));
    const rest = total - inside;
    const about = data.claimed ? `${count(data.stated, "edge")} between roles, as the source of the circuit states them.`
      : data.by === "roles" && kinds.has("plain") ? `Between roles, input and logits: ${inside.toLocaleString("en")} of ${count(total, "edge")}. The others (${rest.toLocaleString("en")}) lead to or from nodes without a role.` : `All ${count(total, "edge")}, summed by ${data.by === "roles" ? "role" : "layer"}.`;
    this.panel.again = () => this.summary();
    this.panel.show(
      element("h3", {}, data.by === "roles" ? count(data.boxes.filter((box) => box.kind === "role").length, "role") : "By layer"),
      element("p", {}, about),
      element("p", { class: "note" }, "Click a box to open it into its nodes and their edges; click a node for what it does; point at an arrow for its edges."),
    );
  }

  showArrow(arrow) {
    this.panel.again = () => this.showArrow(arrow);
    const inside = arrow.names ?? new Set(this.between(arrow).map((e) => this.graph.edges[e][3]));
    this.panel.show(element("h3", {}, this.words(arrow)), ...this.strongest(this.between(arrow).filter((e) => inside.has(this.graph.edges[e][3]))));
  }

  between(arrow) {
    return this.edges().filter((e) => {
      const [i, j, channel] = this.graph.edges[e];
      return this.boxOf.get(i) === arrow.from && this.boxOf.get(j) === arrow.to && (this.data.claimed || arrow.inputs.includes(channel)) && this.readsAt(arrow, i);
    });
  }

  // Whether node i stands at the position of an arrow from the input; what the graph does not name is its `rest`.
  readsAt(arrow, i) {
    const here = this.graph.nodes[i].position, named = (position) => this.graph.drawing.columns.some(([name]) => name === position);
    return !arrow.at || !here || here === arrow.at || (here === "rest" && !named(arrow.at));
  }

  showBox(b) {
    this.panel.again = () => this.showBox(b);
    const box = this.data.boxes[b], touching = this.data.arrows.filter((arrow) => (arrow.from === b) !== (arrow.to === b)).sort((p, q) => this.size(q) - this.size(p));
    const list = (title, some) => (some.length ? [element("h4", {}, title), element("ul", { class: "plain" }, ...some.slice(0, 8).map((arrow) => element("li", {}, this.words(arrow))))] : []);
    const buttons = box.nodes.filter((name) => this.index.has(name)).slice(0, 60).map((name) => {
      const made = element("button", { type: "button" }, name);
      made.addEventListener("click", () => this.pick(this.index.get(name)));
      return made;
    });
    this.panel.show(
      element("h3", {}, box.label),
      box.description ? element("p", { class: "note" }, box.description) : null,
      box.kind === "logits" ? null : element("p", { class: "nodes" }, ...buttons),
      ...list("Reads from", touching.filter((arrow) => arrow.to === b)),
      ...list("Writes to", touching.filter((arrow) => arrow.from === b)),
      ...this.strongest(this.edges().filter((e) => this.boxOf.get(this.graph.edges[e][0]) === b || this.boxOf.get(this.graph.edges[e][1]) === b)),
    );
  }

  strongest(edges) {
    const strength = (e) => Math.abs(this.graph.edges[e][4] ?? 0), seen = new Set();
    const best = [...edges].sort((a, b) => strength(b) - strength(a)).filter((e) => !seen.has(this.graph.edges[e][3]) && seen.add(this.graph.edges[e][3]));
    if (!best.length) return [];
    const rows = best.slice(0, 10).map((e) => element("tr", {}, element("td", {}, this.graph.edges[e][3]), element("td", { class: "number" }, this.graph.scored ? signed(this.graph.edges[e][4]) : "")));
    return [element("h4", {}, this.graph.scored ? "Strongest edges" : `Edges (${best.length.toLocaleString("en")})`), element("table", { class: "written" }, element("tbody", {}, ...rows))];
  }
}

// A label in lines of at most so many letters.
function wrapped(label, most) {
  const lines = [""];
  for (const word of label.split(" ")) {
    const last = lines[lines.length - 1];
    if (last && last.length + 1 + word.length > most) lines.push(word);
    else lines[lines.length - 1] = last ? `${last} ${word}` : word;
  }
  return lines;
}

// The x nearest to `wanted` at which an arrow can pass a row of boxes, away from the arrows that pass there already.
function free(band, wanted) {
  const blocked = [...band.taken, ...band.passed.map((x) => [x - 6, x + 6])];
  const open = (x) => blocked.every(([low, high]) => x <= low || x >= high);
  const found = [wanted, ...blocked.flatMap(([low, high]) => [low, high])].filter(open).sort((a, b) => Math.abs(a - wanted) - Math.abs(b - wanted))[0] ?? wanted;
  band.passed.push(found);
  return found;
}
