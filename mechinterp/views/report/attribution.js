// The attribution graph: positions are columns, layers are rows; what is drawn follows from the state below.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const { nodes, edges, groups, notes, words, sizes } = data;
const AT_FIRST = 90, LISTED = 60, HOVERED = 5, DOT = 15, PER_LINE = 3, PILL = 20, CONSTANTS = -1, GUTTER = 70;
const mean = data.mean ? "mean " : "";  // of several prompts
const state = { size: data.first, chosen: null, errors: true, open: new Set(), query: "", zoom: 1 };
let items = new Map(), links = [], hovered = null;

// -- what is shown

// The item that shows a node: the node itself, or its closed supernode.
const itemOf = (i) => (nodes[i].group >= 0 && !state.open.has(nodes[i].group) ? `g${nodes[i].group}` : `n${i}`);
const here = (bits) => (bits >> state.size) & 1;
const isShown = (i) => here(nodes[i].sizes) && (state.errors || nodes[i].kind !== "error");

function nameOf(item) {
  return item.members.length === 1 && item.group === undefined ? nodes[item.members[0]].name : groups[item.group];
}

// Items with their members, and the sums of the edges between them.
function collect() {
  items = new Map();
  nodes.forEach((node, i) => {
    if (!isShown(i)) return;
    const key = itemOf(i);
    if (!items.has(key)) items.set(key, { key, members: [], group: key[0] === "g" ? node.group : undefined, influence: 0 });
    const item = items.get(key);
    item.members.push(i);
    item.influence += node.influence;
  });
  const sums = new Map(), total = new Map();
  for (let e = 0; e < edges.from.length; e++) {
    const from = edges.from[e], to = edges.to[e];
    if (!here(edges.sizes[e])) continue;
    if (nodes[from].kind !== "bias") total.set(to, (total.get(to) ?? 0) + Math.abs(edges.weight[e]));
    if (!isShown(from) || !isShown(to)) continue;
    const a = itemOf(from), b = itemOf(to);
    if (a === b) continue;
    const key = `${a} ${b}`;
    if (!sums.has(key)) sums.set(key, { from: a, to: b, weight: 0, parts: [] });
    const link = sums.get(key);
    link.weight += edges.weight[e];
    link.parts.push(e);
  }
  links = [...sums.values()];
  for (const link of links) {
    // The share of what its readers get, and that share times the readers' influence: how much flows through it.
    const share = (e) => Math.abs(edges.weight[e]) / (total.get(edges.to[e]) || 1);
    link.constant = link.parts.every((e) => nodes[edges.from[e]].kind === "bias");
    link.share = link.parts.reduce((sum, e) => sum + share(e), 0);
    link.flow = link.constant ? 0 : link.parts.reduce((sum, e) => sum + share(e) * nodes[edges.to[e]].influence, 0);
  }
  links.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

// The cell of an item: column of its position, row of its layer (tokens below, targets above).
function cellOf(item) {
  const rows = item.members.map((i) => ({ token: 0, bias: 0, rest: 0, target: data.layers + 1 })[nodes[i].kind] ?? nodes[i].layer + 1);
  const columns = item.members.map((i) => nodes[i].column ?? (nodes[i].position < 0 ? CONSTANTS : nodes[i].position));
  const often = columns.sort((a, b) => columns.filter((c) => c === b).length - columns.filter((c) => c === a).length || b - a)[0];
  return [often, Math.round(rows.reduce((sum, row) => sum + row, 0) / rows.length)];
}

function matches() {
  const query = state.query.trim().toLowerCase();
  if (!query) return null;
  const said = (i) => {
    const note = notes[nodes[i].note];
    return [nodes[i].name, nodes[i].text, words[nodes[i].position] ?? "", ...(note ? note.raises : [])].join(" ").toLowerCase();
  };
  return new Set([...items.values()].filter((item) => (item.group !== undefined && groups[item.group].toLowerCase().includes(query)) || item.members.some((i) => said(i).includes(query))).map((item) => item.key));
}

// -- the drawing

const short = (label, most = 16) => (label.length > most ? `${label.slice(0, most - 1)}…` : label);

function labelOf(item) {
  if (item.group !== undefined) return short(groups[item.group]);
  const node = nodes[item.members[0]];
  if (node.kind === "token") return short(words[node.position] ?? node.text, 12);
  if (node.kind === "target") return short(`${node.text || node.name}${node.value ? ` ${(100 * node.value).toFixed(0)}%` : ""}`, 20);
  return node.kind === "bias" ? "constants" : node.kind === "rest" ? "others" : "";
}

// Places of all items: dots in lines of three, labelled boxes in a line each.
function layout() {
  const cells = new Map(), zoom = state.zoom, room = byId("figure-attribution").clientWidth - 4, hasConstants = [...items.values()].some((item) => cellOf(item)[0] === CONSTANTS);
  const widths = words.map(() => 26), heights = Array(data.layers + 2).fill(Math.max(26, Math.min(64, 430 / (data.layers + 2))));
  widths[CONSTANTS] = hasConstants ? 70 : 0;
  for (const item of items.values()) {
    const [column, row] = cellOf(item), key = `${column} ${row}`;
    if (!cells.has(key)) cells.set(key, { column, row, dots: [], boxes: [] });
    const label = labelOf(item);
    item.label = label;
    item.width = label ? Math.max(26, 6.6 * label.length + 12) : 0;
    cells.get(key)[label ? "boxes" : "dots"].push(item);
    const own = item.group === undefined ? item.width + 6 : Math.min(item.width, 48); // a supernode may reach over its neighbours
    // The targets of one prompt are in its last column, one above the other, and may reach over it; those of several are side by side.
    if (label && (row <= data.layers || nodes[item.members[0]].column !== undefined)) widths[column] = Math.max(widths[column], own);
  }
  for (const cell of cells.values()) {
    cell.dots.sort((a, b) => b.influence - a.influence);
    cell.boxes.sort((a, b) => a.influence - b.influence);
    const lines = Math.ceil(cell.dots.length / PER_LINE);
    widths[cell.column] = Math.max(widths[cell.column], DOT * Math.min(PER_LINE, cell.dots.length) + 8);
    cell.height = lines * DOT + cell.boxes.length * (PILL + 3);
    heights[cell.row] = Math.max(heights[cell.row], cell.height + 12);
  }
  const xs = new Map(), ys = [], used = words.reduce((sum, _, column) => sum + widths[column], widths[CONSTANTS]);
  const wide = zoom * Math.max(0.9, Math.min(1.8, (room - GUTTER - 34) / used));
  let x = GUTTER;
  for (const column of [CONSTANTS, ...words.keys()]) {
    const width = (widths[column] || 0) * wide;
    xs.set(column, x + width / 2);
    x += width;
  }
  const width = Math.max(x, ...[...cells.values()].flatMap((cell) => cell.boxes.map((item) => xs.get(cell.column) + item.width / 2))) + 6;
  let y = 10;
  for (let row = data.layers + 1; row >= 0; row--) {
    const height = heights[row] * zoom;
    ys[row] = y + height / 2;
    y += height;
  }
  for (const cell of cells.values()) {
    const middle = xs.get(cell.column);
    let at = ys[cell.row] - cell.height / 2;
    for (const item of cell.boxes) {
      Object.assign(item, { x: middle, y: at + PILL / 2 });
      at += PILL + 3;
    }
    cell.dots.forEach((item, k) => {
      const line = Math.floor(k / PER_LINE), inLine = Math.min(PER_LINE, cell.dots.length - line * PER_LINE);
      Object.assign(item, { x: middle + ((k % PER_LINE) - (inLine - 1) / 2) * DOT, y: at + DOT * (line + 0.5) });
    });
  }
  return { width, height: y + 8, ys, xs };
}

function draw() {
  const figure = byId("figure-attribution"), at = figure.scrollLeft, focus = document.activeElement?.dataset?.item;
  const { width, height, ys } = layout();
  const svg = shape("svg", { class: "attribution", width: Math.round(width), height: Math.round(height), role: "group", "aria-label": "The attribution graph; arrow keys go from node to node, Enter shows the edges of one" });
  for (let row = 0; row < ys.length; row++) {
    const name = row === 0 ? "tokens" : row > data.layers ? "logits" : `layer ${row - 1}`;
    svg.append(shape("line", { class: "guide", x1: 66, x2: width, y1: ys[row], y2: ys[row] }), shape("text", { class: "row-name", x: 60, y: ys[row] + 4, "text-anchor": "end" }, name));
  }
  svg.append(shape("g", { class: "edges" }), shape("g", { class: "hot" }), shape("g", { class: "items" }));
  const most = Math.max(1e-12, ...[...items.values()].filter((item) => !item.label).map((item) => item.influence));
  for (const item of items.values()) svg.querySelector(".items").append(shapeOf(item, most));
  figure.replaceChildren(svg);
  figure.scrollLeft = at;
  const seat = (focus && svg.querySelector(`[data-item="${focus}"]`)) || svg.querySelector(`[data-item="${state.chosen}"]`) || svg.querySelector(".item");
  seat?.setAttribute("tabindex", 0);
  if (focus) seat?.focus({ preventScroll: true });
}

function shapeOf(item, most) {
  const node = nodes[item.members[0]], kind = item.group !== undefined ? "super" : { bias: "constant", rest: "constant" }[node.kind] ?? node.kind;
  const made = shape("g", { class: "item", transform: `translate(${item.x.toFixed(1)} ${item.y.toFixed(1)})`, role: "button", tabindex: -1, "data-item": item.key, "aria-label": nameOf(item), "aria-pressed": item.key === state.chosen });
  const r = 3.2 + 3.3 * Math.sqrt(item.influence / most);
  if (item.label) made.append(shape("rect", { class: kind, x: -item.width / 2, y: -PILL / 2, width: item.width, height: PILL, rx: kind === "super" ? 9 : 3 }), shape("text", { y: 4, "text-anchor": "middle" }, item.label));
  else if (kind === "error") made.append(shape("path", { class: kind, d: `M0 ${-r - 1}L${r + 1} 0L0 ${r + 1}L${-r - 1} 0z` }));
  else made.append(shape("circle", { class: kind, r: r.toFixed(1) }));
  made.append(shape("title", {}, item.group !== undefined ? `${groups[item.group]}: ${count(item.members.length, "node")}` : `${node.name}${node.text && node.kind === "feature" ? `: ${node.text}` : ""}`));
  return made;
}

function paint(where, some, strong) {
  const most = Math.max(1e-12, ...some.filter((link) => !link.constant).map((link) => (strong ? link.share : link.flow)));
  byId("figure-attribution").querySelector(where).replaceChildren(...some.map((link) => {
    const a = items.get(link.from), b = items.get(link.to), part = Math.min(1, (strong ? link.share : link.flow) / most);
    const y0 = a.y - (a.label ? PILL / 2 : 4), y1 = b.y + (b.label ? PILL / 2 : 4), bend = Math.max(14, (y0 - y1) * 0.45);
    return shape("path", { class: `edge ${link.weight < 0 ? "loss" : "gain"}`, d: `M${a.x.toFixed(1)} ${y0.toFixed(1)}C${a.x.toFixed(1)} ${(y0 - bend).toFixed(1)} ${b.x.toFixed(1)} ${(y1 + bend).toFixed(1)} ${b.x.toFixed(1)} ${y1.toFixed(1)}`, "stroke-width": (0.6 + 4.4 * part).toFixed(2), "stroke-opacity": (strong ? 0.35 + 0.6 * part : 0.16 + 0.6 * part).toFixed(2) });
  }));
}

const touching = (key) => links.filter((link) => link.from === key || link.to === key);

function render() {
  collect();
  if (!items.has(state.chosen)) state.chosen = null;
  draw();
  const hits = matches(), own = state.chosen && touching(state.chosen);
  const near = own && new Set([state.chosen, ...own.flatMap((link) => [link.from, link.to])]);
  if (own) paint(".edges", own, true);
  else paint(".edges", [...links].sort((a, b) => b.flow - a.flow).filter((link) => !link.constant).slice(0, AT_FIRST), false);
  for (const made of byId("figure-attribution").querySelectorAll(".item")) {
    const key = made.dataset.item;
    made.classList.toggle("chosen", key === state.chosen);
    made.classList.toggle("off", Boolean((near && !near.has(key)) || (hits && !hits.has(key))));
  }
  const size = sizes[state.size];
  byId("size").value = state.size;
  byId("size-says").textContent = `${size.says}: ${count(size.features, "feature")}, ${count(size.edges, "edge")}`;
  byId("size").setAttribute("aria-valuetext", byId("size-says").textContent);
  byId("search-says").textContent = hits ? (hits.size ? count(hits.size, "match").replace("matchs", "matches") : "no match") : "";
  byId("everything").disabled = state.chosen === null && !state.query;
  byId("groups").checked = !groups.some((_, g) => state.open.has(g));
  if (state.chosen) show(state.chosen, LISTED);
  else summary();
}

// -- the panel

function panelOf(...children) {
  byId("panel").replaceChildren(...children.flat().filter(Boolean));
  byId("panel").scrollTop = 0;
}

function summary() {
  const size = sizes[state.size];
  panelOf(
    element("h3", {}, `${count(size.features, "feature")}, ${count(size.edges, "edge")}`),
    facts(size.facts),
    element("p", { class: "note" }, "Point at a node for what it writes and where it fires; click it for its edges, sorted. A supernode opens from its panel. Escape shows everything."),
  );
}

function describe(i) {
  const node = nodes[i], note = notes[node.note], rows = [...(node.facts ?? [])];
  if (node.position >= 0) rows.push(["token", `${words[node.position]} (position ${node.position})`]);
  if (node.kind === "feature") rows.push([`${mean}activation`, number(node.value)]);
  if (node.kind === "target" && node.value) rows.push([`${mean}probability`, number(node.value)]);
  if (node.pre !== null && node.kind === "target") rows.push(["logit less the mean", signed(node.pre, 4)]);
  if (node.pre !== null && node.kind === "feature") rows.push(["pre-activation", signed(node.pre, 4)]);
  if (node.kind !== "bias") rows.push([`${mean}${node.kind === "target" ? "weight" : "influence"}`, number(node.influence, 3)]);
  const kind = { error: "What the transcoders miss of this layer here: not explained.", bias: "Biases, learned positions: the same whatever was read.", rest: "Active features that have no node." }[node.kind];
  const of = [facts(rows)];
  if (node.kind === "token" && node.position < 0) of.unshift(element("p", {}, node.text));
  if (kind) of.push(element("p", { class: "note" }, kind));
  if (node.kind === "feature" && node.text) of.unshift(element("p", {}, node.text));
  if (note) {
    if (note.raises.length) of.push(facts([["raises", note.raises.join(", ")], ["lowers", note.lowers.join(", ")]]));
    if (note.tokens) of.push(element("p", { class: "note" }, `active on ${number((100 * note.fired) / note.tokens, 2)}% of ${note.tokens.toLocaleString("en")} tokens${note.examples.length ? "; strongest:" : ""}`));
    if (note.examples.length) of.push(element("ul", { class: "examples" }, ...note.examples.map(([value, before, token, after]) => element("li", {}, element("span", { class: "value" }, number(value, 3)), before, /^\s/.test(token) ? " " : "", element("mark", {}, token.trim() || token), after))));
  }
  return of;
}

function listOf(title, some, end, most) {
  if (!some.length) return [];
  const rows = some.slice(0, most).map((link) => {
    const other = items.get(link[end]), button = element("button", { type: "button" }, saying(other));
    button.addEventListener("click", () => choose(link[end]));
    return element("tr", {}, element("td", {}, button), element("td", { class: "number" }, signed(link.weight)), element("td", { class: "number soft" }, link.constant ? "" : `${(100 * link.share).toFixed(link.share < 0.1 ? 1 : 0)}%`), edges.says ? element("td", { class: "soft" }, link.parts.length === 1 ? edges.says[link.parts[0]] : "") : null);
  });
  const more = some.length > most ? element("p", { class: "note" }, `and ${count(some.length - most, "smaller one")}`) : null;
  return [element("h4", {}, `${title} (${some.length.toLocaleString("en")})`), element("table", { class: "edges" }, element("tbody", {}, ...rows)), more];
}

function saying(item) {
  if (item.group !== undefined) return `${groups[item.group]} (${item.members.length})`;
  const node = nodes[item.members[0]], word = node.position >= 0 ? ` ${words[node.position]}` : "";
  const what = node.text && node.kind === "feature" ? `: ${node.text}` : "";
  return node.kind === "target" ? node.name : `${node.name}${word}${what}`;
}

function show(key, most) {
  const item = items.get(key), group = item.group, own = touching(key);
  const head = [element("h3", {}, group === undefined ? nodes[item.members[0]].name : groups[group])];
  const inside = nodes[item.members[0]].group;
  if (inside >= 0) {
    const button = element("button", { type: "button", id: "open-group" }, group === undefined ? `Close the supernode “${groups[inside]}”` : `Open into ${count(item.members.length, "node")}`);
    button.addEventListener("click", () => toggle(inside));
    head.push(element("p", {}, button));
  }
  const about = group === undefined ? describe(item.members[0]) : [
    facts([["influence", number(item.influence, 3)]]),
    element("ul", { class: "plain" }, ...item.members.slice(0, 20).map((i) => element("li", {}, saying({ members: [i] })))),
    element("p", { class: "note" }, "Edges are summed over its nodes; those between its nodes are inside."),
  ];
  const hidden = state.errors ? null : element("p", { class: "note" }, "Errors are hidden; percentages still count them.");
  panelOf(head, about, hidden, ...listOf("In", own.filter((link) => link.to === key), "from", most), ...listOf("Out", own.filter((link) => link.from === key), "to", most));
}

// -- what a reader does

function choose(key) {
  state.chosen = key === state.chosen ? null : key;
  hovered = null;
  render();
}

function toggle(group) {
  if (state.open.has(group)) state.open.delete(group);
  else state.open.add(group);
  state.chosen = state.open.has(group) ? null : `g${group}`;
  render();
}

function everything() {
  state.query = byId("search").value = "";
  state.chosen = hovered = null;
  render();
}

function go(size) {
  state.size = Math.max(0, Math.min(sizes.length - 1, size));
  render();
}

function pointAt(key) {
  if (key === hovered) return;
  const before = hovered ?? state.chosen;
  hovered = key;
  byId("figure-attribution").querySelector(".edges").style.opacity = key && key !== state.chosen ? 0.25 : 1;
  paint(".hot", key && key !== state.chosen ? touching(key) : [], true);
  if ((key ?? state.chosen) === before) return; // the panel stays, and so do its buttons
  if (key) show(key, key === state.chosen ? LISTED : HOVERED);
  else if (state.chosen) show(state.chosen, LISTED);
  else summary();
}

// The nearest item in the direction of an arrow key.
function step(key, arrow) {
  const from = items.get(key), [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[arrow];
  const ahead = [...items.values()].map((item) => [item, (item.x - from.x) * dx + (item.y - from.y) * dy, Math.abs((item.x - from.x) * dy) + Math.abs((item.y - from.y) * dx)]);
  const next = ahead.filter(([, along]) => along > 1).sort((a, b) => a[1] + 2 * a[2] - b[1] - 2 * b[2])[0]?.[0];
  if (!next) return;
  const find = (one) => byId("figure-attribution").querySelector(`[data-item="${one}"]`);
  find(key).setAttribute("tabindex", -1);
  find(next.key).setAttribute("tabindex", 0);
  find(next.key).focus();
}

function watch() {
  const figure = byId("figure-attribution"), at = (event) => event.target.closest?.("[data-item]")?.dataset.item ?? null;
  figure.addEventListener("pointerover", (event) => event.pointerType === "touch" || pointAt(at(event)));
  figure.addEventListener("pointerleave", () => pointAt(null));
  figure.addEventListener("click", (event) => (at(event) ? choose(at(event)) : state.chosen && choose(state.chosen)));
  figure.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && pointAt(at(event)));
  figure.addEventListener("focusout", (event) => byId("panel").contains(event.relatedTarget) || pointAt(null));
  figure.addEventListener("keydown", (event) => {
    const key = at(event);
    if (!key) return;
    if (event.key === "Enter" || event.key === " ") choose(key);
    else if (event.key.startsWith("Arrow")) step(key, event.key);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && everything());
  byId("size").max = sizes.length - 1;
  byId("size-control").hidden = sizes.length < 2;
  byId("size").addEventListener("input", () => go(Number(byId("size").value)));
  byId("search").addEventListener("input", () => {
    state.query = byId("search").value;
    render();
  });
  byId("errors").addEventListener("change", () => {
    state.errors = byId("errors").checked;
    render();
  });
  byId("groups-control").hidden = !groups.length;
  byId("groups").addEventListener("change", () => {
    state.open = new Set(byId("groups").checked ? [] : groups.keys());
    render();
  });
  for (const [id, factor] of [["smaller", 1 / 1.25], ["larger", 1.25]]) byId(id).addEventListener("click", () => {
    state.zoom = Math.max(0.6, Math.min(3, state.zoom * factor));
    render();
  });
  byId("everything").addEventListener("click", everything);
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const named = () => {
    byId("theme").textContent = dark() ? "Light" : "Dark";
  };
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    named();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();
}

function legend() {
  const key = (made, label) => element("span", { class: "key" }, made, label);
  const swatch = (kind, colour) => {
    const made = element("i", { class: kind });
    if (colour) made.style.background = `var(${colour})`;
    return made;
  };
  const parts = [key(swatch("round", "--accent"), "feature (the larger, the more influence)"), key(swatch("diamond"), "error"), key(swatch("square", "--cell"), "token"), key(swatch("square", "--ink"), "target")];
  if (groups.length) parts.push(key(swatch("pill"), "supernode"));
  parts.push(key(element("i", { class: "line gain" }), "raises"), key(element("i", { class: "line loss" }), "lowers"));
  byId("legend").replaceChildren(...parts);
}

legend();
watch();
render();
