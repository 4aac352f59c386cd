// The page's state and its controls: which size, which node, which search, which colours.

const data = JSON.parse(document.getElementById("data").textContent);
const graph = data.graph, stops = graph.stops, curveOn = data.curve?.pairs ?? "";
const byId = (id) => document.getElementById(id);
graph.edges = unpacked(graph);
const FIRST_LINES = 500; // more lines than this are not drawn at once
const state = { stop: Math.max(0, ownStop()), chosen: null, query: "", zoom: 1, most: FIRST_LINES, drawn: [] };
const panel = new Panel(byId("panel"), graph, data.details);
const members = stops.map((stop) => stop.edges.flatMap(([first, last]) => Array.from({ length: last - first + 1 }, (_, i) => first + i)));
let drawing, hovered = null, markCurve = () => {};

function ownStop() {
  const own = stops.map((stop, i) => [stop, i]).filter(([stop]) => stop.circuit);
  return (own.find(([stop]) => stop.faithfulness !== null) ?? own[0] ?? [null, 0])[1];
}

// The edges that lie on a path through the node: all that lead to it, and all that it leads to.
function through(node, edges) {
  const reach = (near, far) => {
    const next = new Map();
    for (const e of edges) {
      const from = graph.edges[e][near];
      if (!next.has(from)) next.set(from, []);
      next.get(from).push(graph.edges[e][far]);
    }
    const seen = new Set([node]), open = [node];
    while (open.length) for (const other of next.get(open.pop()) ?? []) if (!seen.has(other)) {
      seen.add(other);
      open.push(other);
    }
    return seen;
  };
  const before = reach(1, 0), after = reach(0, 1);
  return edges.filter((e) => (before.has(graph.edges[e][0]) && before.has(graph.edges[e][1])) || (after.has(graph.edges[e][0]) && after.has(graph.edges[e][1])));
}

function ends(edges) {
  const found = new Set();
  for (const e of edges) found.add(graph.edges[e][0]).add(graph.edges[e][1]);
  return found;
}

// The faithfulness of a size: what was measured, and on which pairs.
function measured(stop) {
  const values = [];
  if (stop.faithfulness !== null) values.push([stop.faithfulness.toFixed(3), ` on the ${curveOn} pairs`]);
  if (stop.held_out) values.push([stop.held_out.value.toFixed(3), ` [${stop.held_out.ci.map((v) => v.toFixed(3)).join(", ")}] on the ${stop.held_out.pairs} pairs`]);
  return values.length ? values : [["not stated", " in the file"]];
}

// What the search finds: a node by its whole name, else by a part of its name or role; an edge by a part of its name.
function found(edges, nodes) {
  const query = state.query.trim().toLowerCase();
  if (!query) return null;
  const words = (i) => [graph.nodes[i].name, graph.nodes[i].bare, graph.roles[graph.nodes[i].role]?.label ?? ""].map((word) => word.toLowerCase());
  const exact = nodes.filter((i) => words(i).includes(query));
  const matched = exact.length ? exact : nodes.filter((i) => words(i).some((word) => word.includes(query)));
  const isNode = new Set(matched), named = (e) => query.includes("->") && graph.edges[e][3].toLowerCase().includes(query);
  const byName = edges.filter(named);
  const lines = edges.filter((e) => isNode.has(graph.edges[e][0]) || isNode.has(graph.edges[e][1]) || named(e));
  return { nodes: matched, edges: lines, lit: new Set([...matched, ...ends(byName)]), named: byName };
}

// The lines to draw: the strongest of those shown, all lines of the chosen node, and what the search found.
function strongest(edges, hits) {
  if (edges.length <= state.most) return edges;
  const sizes = Float64Array.from(edges, (e) => Math.abs(graph.edges[e][4] ?? 0)), limit = sizes.slice().sort()[edges.length - state.most];
  const kept = new Set(edges.filter((_, k) => sizes[k] > limit));
  for (let k = 0; kept.size < state.most; k++) if (sizes[k] === limit) kept.add(edges[k]);
  if (state.chosen !== null) for (const e of edges) if (graph.edges[e][0] === state.chosen || graph.edges[e][1] === state.chosen) kept.add(e);
  for (const e of hits?.edges.slice(0, 5000) ?? []) kept.add(e);
  return [...kept];
}

function render() {
  const stop = stops[state.stop], all = members[state.stop], inStop = ends(all);
  if (state.chosen !== null && !inStop.has(state.chosen)) state.chosen = null;
  const edges = state.chosen === null ? all : through(state.chosen, all);
  const nodes = ends(edges);
  if (state.chosen !== null) nodes.add(state.chosen);
  place();
  const hits = found(edges, [...nodes]);
  state.edges = edges;
  state.lit = hits && new Set(hits.edges);
  state.drawn = strongest(edges, hits);
  paint();
  for (const [i, box] of drawing.nodes) {
    box.classList.toggle("gone", !inStop.has(i));
    box.classList.toggle("off", !nodes.has(i) || Boolean(hits && !hits.lit.has(i)));
    box.classList.toggle("chosen", i === state.chosen);
    box.setAttribute("aria-pressed", i === state.chosen);
  }
  rove();
  byId("everything").disabled = state.chosen === null && !state.query;
  byId("search-says").textContent = hits ? (hits.nodes.length || hits.named.length ? `${count(hits.nodes.length, "node")}, ${count(hits.edges.length, "edge")}` : "no match") : "";
  if (stops.length > 1) {
    byId("size").value = state.stop;
    byId("size-says").replaceChildren(
      element("b", {}, count(stop.n_edges, "edge")), stop.circuit ? " (this circuit): faithfulness " : ": faithfulness ",
      ...measured(stop).flatMap(([value, on], k) => [k ? "; " : "", element("b", { class: "value" }, value), element("span", { class: "soft" }, on)]),
    );
    byId("size").setAttribute("aria-valuetext", byId("size-says").textContent);
  }
  markCurve(stop);
  sayLines();
  light(null);
  if (state.chosen !== null) panel.node(state.chosen, all, true);
  else panel.summary(stop);
}

// Weak lines fade, more so where there are many; a line also fades with the share of resamples that have it.
function paint() {
  const crowd = Math.min(1, Math.log(1 + state.drawn.length / 60) / Math.log(1 + 1000 / 60)), base = graph.scored ? 0.75 - 0.63 * crowd : 0.75 - 0.5 * crowd;
  const opacity = (e, share) => (state.lit && !state.lit.has(e) ? 0.05 : (0.25 + 0.75 * (graph.edges[e][5] ?? 1)) * (base + (0.95 - base) * share));
  drawing.paint(drawing.base, state.drawn, opacity, tint());
}

// The colour of a line: of the input that it enters, or of its sign.
function tint() {
  const look = getComputedStyle(document.documentElement), signs = byId("graph").classList.contains("signs");
  const [gain, loss] = [look.getPropertyValue("--gain").trim(), look.getPropertyValue("--loss").trim()];
  return (channel, score) => (signs ? (score < 0 ? loss : gain) : graph.channels[channel][1]);
}

function sayLines() {
  const control = byId("lines-control"), n = state.edges.length;
  control.hidden = members.every((edges) => edges.length <= FIRST_LINES);
  if (control.hidden) return;
  byId("lines-says").textContent = state.drawn.length >= n ? `all ${n.toLocaleString("en")}` : `the ${graph.scored ? "strongest" : "first"} ${state.drawn.length.toLocaleString("en")} of ${n.toLocaleString("en")}`;
}

function place() {
  const figure = byId("figure-circuit"), room = figure.clientWidth - 2;
  if (drawing && drawing.zoom === state.zoom && Math.abs(drawing.room - room) < 24) return;
  drawing = new Drawing(graph, room, state.zoom);
  figure.replaceChildren(drawing.stack);
}

// One node is reached with Tab; the arrow keys go on from it.
function rove() {
  const there = [...drawing.nodes].filter(([, box]) => !box.classList.contains("gone"));
  for (const [, box] of there) box.setAttribute("tabindex", -1);
  const first = there.find(([i]) => i === state.chosen) ?? there[0];
  first?.[1].setAttribute("tabindex", 0);
}

// Brings the lines of a node, or one line, to the front; null: none.
function light(edges) {
  drawing.base.classList.toggle("faded", edges !== null);
  if (edges === null) drawing.clear(drawing.hot);
  else drawing.paint(drawing.hot, edges, () => 1, tint());
}

function pointAt(kind, i) {
  const key = kind && `${kind}${i}`;
  if (key === hovered) return;
  hovered = key;
  if (kind === "node") {
    light(state.edges.filter((e) => graph.edges[e][0] === i || graph.edges[e][1] === i));
    panel.node(i, members[state.stop], i === state.chosen);
  } else if (kind === "edge") {
    light([i]);
    panel.edge(i);
  } else {
    light(null);
    if (state.chosen !== null) panel.node(state.chosen, members[state.stop], true);
  }
}

function choose(node) {
  state.chosen = node === state.chosen ? null : node;
  hovered = null;
  render();
}

function everything() {
  state.query = byId("search").value = "";
  state.chosen = hovered = null;
  render();
}

function go(stop) {
  state.stop = Math.max(0, Math.min(stops.length - 1, stop));
  hovered = null;
  render();
}

function nodeOf(event) {
  const box = event.target.closest?.("[data-node]");
  return box && !box.classList.contains("gone") ? Number(box.dataset.node) : null;
}

function edgeAt(x, y, reach) {
  const box = drawing.svg.getBoundingClientRect();
  return drawing.nearest(x - box.left, y - box.top, state.drawn, reach);
}

function watchGraph() {
  const figure = byId("figure-circuit");
  let waiting = null;
  figure.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const last = { target: event.target, x: event.clientX, y: event.clientY };
    if (waiting) {
      waiting.event = last;
      return;
    }
    waiting = { event: last };
    requestAnimationFrame(() => {
      const { event: at } = waiting;
      waiting = null;
      const node = nodeOf(at);
      if (node !== null) return pointAt("node", node);
      const edge = edgeAt(at.x, at.y, 7);
      return edge === undefined ? pointAt(null) : pointAt("edge", edge);
    });
  });
  figure.addEventListener("pointerleave", (event) => event.pointerType === "touch" || pointAt(null));
  figure.addEventListener("click", (event) => {
    const node = nodeOf(event), edge = node === null && event.pointerType === "touch" ? edgeAt(event.clientX, event.clientY, 14) : undefined;
    if (node !== null) choose(node);
    else if (edge !== undefined) pointAt("edge", edge);
    else if (state.chosen !== null) choose(state.chosen);
  });
  figure.addEventListener("focusin", (event) => {
    const node = nodeOf(event);
    if (node !== null) pointAt("node", node);
  });
  figure.addEventListener("focusout", () => pointAt(null));
  figure.addEventListener("keydown", (event) => {
    const node = nodeOf(event);
    if (node === null) return;
    if (event.key === "Enter" || event.key === " ") {
      choose(node);
      drawing.nodes.get(node).focus();
    } else if (event.key.startsWith("Arrow")) step(node, event.key);
    else return;
    event.preventDefault();
  });
}

// The nearest node in the row beside, or the next one in the row.
function step(node, key) {
  const [x, y] = drawing.data.places[node];
  const there = [...drawing.nodes].filter(([i, box]) => i !== node && !box.classList.contains("gone")).map(([i]) => [i, ...drawing.data.places[i]]);
  const side = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1 }[key];
  const along = key === "ArrowLeft" || key === "ArrowRight";
  const ahead = there.filter(([, a, b]) => (along ? b === y && (a - x) * side > 0 : (b - y) * side > 0));
  const distance = ([, a, b]) => (along ? Math.abs(a - x) : Math.abs(b - y) * 1000 + Math.abs(a - x));
  const next = ahead.sort((a, b) => distance(a) - distance(b))[0];
  if (!next) return;
  drawing.nodes.get(node).setAttribute("tabindex", -1);
  drawing.nodes.get(next[0]).setAttribute("tabindex", 0);
  drawing.nodes.get(next[0]).focus();
}

function legend() {
  const swatch = (kind, colour) => {
    const made = element("i", { class: kind });
    made.style.background = colour;
    return made;
  };
  const parts = graph.roles.map((role) => {
    const button = element("button", { type: "button", title: role.description || role.label, class: "key" }, swatch("round", role.colour), `${role.label} (${role.n})`);
    button.addEventListener("click", () => search(state.query === role.label ? "" : role.label));
    return button;
  });
  const plain = new Set(graph.nodes.filter((node) => node.role < 0).map((node) => node.kind));
  for (const [kind, [label, colour]] of Object.entries(graph.kinds)) {
    if (plain.has(kind)) parts.push(element("span", { class: "key" }, swatch(kind === "head" ? "round" : "square", colour), label));
  }
  const used = new Set(graph.edges.map((edge) => edge[2])), lines = element("span", { class: "keys by-input" }), signs = element("span", { class: "keys by-sign" });
  for (const [channel, [label, colour]] of Object.entries(graph.channels)) if (used.has(channel)) lines.append(element("span", { class: "key" }, swatch("line", colour), label));
  signs.append(element("span", { class: "key" }, element("i", { class: "line gain" }), "helps the task"), element("span", { class: "key" }, element("i", { class: "line loss" }), "works against it"));
  if (graph.scored) lines.append(element("span", { class: "key" }, element("i", { class: "dashed" }), "negative score"));
  byId("legend").replaceChildren(...parts, lines, signs);
}

function search(words) {
  state.query = byId("search").value = words;
  hovered = null;
  render();
}

function dark() {
  const forced = document.documentElement.dataset.theme;
  return forced ? forced === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function themeButton() {
  byId("theme").textContent = dark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", dark() ? "Light colours" : "Dark colours");
}

function themed() {
  themeButton();
  paint();
  panel.again();
}

function watchControls() {
  if (stops.length > 1) {
    byId("size").max = stops.length - 1;
    byId("size-control").hidden = false;
    byId("size").addEventListener("input", () => go(Number(byId("size").value)));
  }
  if (!graph.scored) byId("colour-control").hidden = true;
  byId("search").addEventListener("input", () => search(byId("search").value));
  byId("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const hits = found(state.edges, [...ends(state.edges)]);
    if (hits?.nodes.length) choose(hits.nodes[0]);
  });
  for (const radio of document.querySelectorAll("input[name=colour]")) {
    radio.addEventListener("change", () => {
      byId("graph").classList.toggle("signs", radio.value === "sign" && radio.checked);
      paint();
    });
  }
  const zoom = (factor) => {
    state.zoom = Math.max(0.4, Math.min(3, state.zoom * factor));
    render();
  };
  byId("lines").addEventListener("input", () => {
    const most = Math.max(...members.map((edges) => edges.length)), least = 50;
    state.most = Math.round(least * (most / least) ** (Number(byId("lines").value) / 100));
    render();
  });
  byId("lines").value = Math.round((100 * Math.log(FIRST_LINES / 50)) / Math.log(Math.max(FIRST_LINES, ...members.map((edges) => edges.length)) / 50));
  byId("smaller").addEventListener("click", () => zoom(1 / 1.25));
  byId("larger").addEventListener("click", () => zoom(1.25));
  byId("everything").addEventListener("click", everything);
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    themed();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") everything();
  });
  window.addEventListener("resize", render);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themed);
}

legend();
if (data.curve) {
  markCurve = drawCurve(byId("figure-sizes"), byId("readout-sizes"), data.curve, (n) => {
    const at = stops.findIndex((stop) => stop.n_edges === n);
    if (at >= 0 && stops.length > 1) go(at);
  });
}
if (data.heat) {
  drawHeat(byId("figure-heads"), byId("readout-heads"), data.heat, (name) => {
    const at = graph.nodes.findIndex((node, i) => node.bare === name && ends(members[state.stop]).has(i));
    if (at >= 0) {
      choose(at);
      byId("graph").scrollIntoView({ behavior: "smooth" });
    }
  });
}
const own = Math.max(0, ownStop());
const diagrams = graph.diagrams.map((one) => new Diagram(byId("figure-diagram"), new Panel(byId("diagram-panel"), graph, data.details), graph, one, () => members[own]));
for (const diagram of diagrams) {
  diagram.render();
  diagram.summary();
  if (byId("plain")) byId("plain").checked = diagram.plain;
  window.addEventListener("resize", () => diagram.render());
  byId("plain")?.addEventListener("change", () => {
    diagram.plain = byId("plain").checked;
    diagram.render();
  });
}
watchControls();
watchGraph();
themeButton();
render();
performance.mark("drawn");
