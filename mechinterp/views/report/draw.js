"use strict";
// Draws the graph: nodes, lines, rows and columns. Knows nothing of what is selected, searched or pointed at.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 72, LEFT = 84, TOP = 16, NODE_HALF = 0.2, NODE_HEIGHT = 24;
const WIDTHS = [0.7, 6];

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(digits)));
}

function signed(value, digits = 3) {
  return (value > 0 ? "+" : value < 0 ? "\u2212" : "") + number(Math.abs(value), digits);
}

function count(n, thing) {
  return `${n.toLocaleString("en")} ${thing}${n === 1 ? "" : "s"}`;
}

// Black or white, whichever can be read on the colour.
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 150 ? "#14181c" : "#ffffff";
}

// The points that a line goes through: out of its writer, once per row, into its reader.
function knotsOf(xs, low, high) {
  return xs.map((x, i) => [x, i === 0 ? low + NODE_HALF : i === xs.length - 1 ? high - NODE_HALF : low + i]);
}

// Monotone cubic pieces as Bezier curves [x0, y0, x1, y1, x2, y2, x3, y3]; the slopes are harmonic means.
function pieces(knots) {
  const steps = knots.slice(1).map(([x, y], i) => (x - knots[i][0]) / (y - knots[i][1]));
  const slopes = knots.map((_, i) => {
    const a = steps[i - 1], b = steps[i];
    return a !== undefined && b !== undefined && a * b > 0 ? (2 * a * b) / (a + b) : 0;
  });
  return knots.slice(1).map(([x, y], i) => {
    const [x0, y0] = knots[i], third = (y - y0) / 3;
    return [x0, y0, x0 + slopes[i] * third, y0 + third, x - slopes[i + 1] * third, y - third, x, y];
  });
}

function sampled(curves, perPiece) {
  const out = [];
  for (const [x0, y0, x1, y1, x2, y2, x3, y3] of curves) {
    for (let i = 0; i <= perPiece; i++) {
      const t = i / perPiece, u = 1 - t;
      out.push(u * u * u * x0 + 3 * u * u * t * x1 + 3 * u * t * t * x2 + t * t * t * x3);
      out.push(u * u * u * y0 + 3 * u * u * t * y1 + 3 * u * t * t * y2 + t * t * t * y3);
    }
  }
  return Float32Array.from(out);
}

class Drawing {
  constructor(graph, number) {
    this.graph = graph;
    this.data = graph.drawings[number];
    this.paths = new Map();
    this.nodes = new Map();
    this.samples = new Map();
    const columns = this.data.columns, names = Object.keys(this.data.places).map(Number);
    this.label = (i) => (columns.length ? graph.nodes[i].bare : graph.nodes[i].name);
    const widest = Math.max(36, ...names.map((i) => this.nodeWidth(i)));
    this.unit = columns.length ? widest + 8 : Math.max(80, widest / 0.54);
    const [low, high] = this.data.range, n = this.data.rows.length;
    this.low = low;
    this.width = LEFT + (high - low + 1) * this.unit;
    this.top = TOP + (columns.length ? 14 : 0);
    this.height = this.top * 2 + n * ROW;
    this.x = (x) => LEFT + (x - low + 0.5) * this.unit;
    this.y = (y) => this.top + (n - 0.5 - y) * ROW;
    this.lines = shape("g", { class: "lines" });
    this.hot = shape("g", { class: "hot" });
    this.boxes = shape("g", { class: "boxes" });
    this.svg = shape("svg", {
      viewBox: `0 0 ${this.width.toFixed(1)} ${this.height}`,
      role: "group",
      "aria-label": "The circuit as a graph; arrow keys go from node to node, Enter shows the paths through one",
    }, this.rows(), this.lines, this.hot, this.boxes);
    this.addLines();
    for (const i of names) this.addNode(i);
  }

  nodeWidth(i) {
    return Math.max(36, 6.9 * this.label(i).length + 14);
  }

  rows() {
    const group = shape("g", { class: "rows", "aria-hidden": "true" });
    this.data.rows.forEach((label, y) => group.append(
      shape("line", { x1: LEFT - 8, x2: this.width, y1: this.y(y), y2: this.y(y) }),
      shape("text", { x: LEFT - 14, y: this.y(y) + 4, "text-anchor": "end" }, label),
    ));
    for (const [name, x] of this.data.columns) {
      for (const y of [18, this.height - 10]) group.append(shape("text", { x: this.x(x), y, "text-anchor": "middle", class: "column" }, name));
    }
    return group;
  }

  // The strong lines come last and so lie on top.
  addLines() {
    const { edges } = this.graph, strength = (i) => Math.abs(edges[i][4] ?? 0);
    const largest = Math.max(...edges.map((edge) => Math.abs(edge[4] ?? 0)));
    const order = Object.keys(this.data.knots).map(Number).sort((a, b) => strength(a) - strength(b) || a - b);
    for (const i of order) {
      const [from, to, channel, , score] = edges[i];
      const knots = knotsOf(this.data.knots[i], this.data.places[from][1], this.data.places[to][1]);
      const curves = pieces(knots.map(([x, y]) => [x, y])).map((curve) =>
        curve.map((value, k) => (k % 2 ? this.y(value) : this.x(value))));
      const round = (values) => values.map((value) => value.toFixed(1)).join(" ");
      const d = `M${round(curves[0].slice(0, 2))}` + curves.map((curve) => `C${round(curve.slice(2))}`).join("");
      const share = score === null || largest === 0 ? null : Math.abs(score) / largest;
      const width = share === null ? 1.2 : WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * share;
      const path = shape("path", {
        d,
        class: score < 0 ? "against" : "helps",
        stroke: this.graph.channels[channel][1],
        "stroke-width": width.toFixed(2),
        "stroke-dasharray": score < 0 ? `${(4 + width).toFixed(1)} ${(3 + 0.6 * width).toFixed(1)}` : undefined,
        "data-edge": i,
      });
      path.share = share ?? 0;
      path.frequency = edges[i][5] ?? 1;
      this.paths.set(i, path);
      this.samples.set(i, sampled(curves, 6));
      this.lines.append(path);
    }
  }

  addNode(i) {
    const node = this.graph.nodes[i], [x, y] = this.data.places[i], width = this.nodeWidth(i);
    const role = this.graph.roles[node.role], colour = role ? role.colour : this.graph.kinds[node.kind][1];
    const round = node.kind === "head" ? NODE_HEIGHT / 2 : node.kind === "neuron" ? 7 : 3;
    const box = shape("g", {
      class: `node ${node.kind}`,
      transform: `translate(${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)})`,
      role: "button",
      tabindex: -1,
      "data-node": i,
      "aria-label": `${node.name}, ${role ? role.label : node.what}`,
    },
    shape("rect", { x: -width / 2, y: -NODE_HEIGHT / 2, width, height: NODE_HEIGHT, rx: round, fill: colour }),
    shape("text", { y: 4, "text-anchor": "middle", fill: inkOn(colour) }, this.label(i)));
    this.nodes.set(i, box);
    this.boxes.append(box);
  }

  // The line nearest to a point of the drawing, among those given; undefined when none is within `reach`.
  nearest(x, y, among, reach) {
    let best, bestDistance = reach * reach;
    for (const i of among) {
      const points = this.samples.get(i);
      if (!points || y < points[points.length - 1] - reach || y > points[1] + reach) continue;
      for (let k = 0; k + 3 < points.length; k += 2) {
        const ax = points[k], ay = points[k + 1], dx = points[k + 2] - ax, dy = points[k + 3] - ay;
        if (y > ay + reach || y < ay + dy - reach) continue;
        const along = dx * dx + dy * dy;
        const t = along ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / along)) : 0;
        const distance = (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2;
        if (distance < bestDistance || (distance === bestDistance && best !== undefined)) {
          best = i;
          bestDistance = distance;
        }
      }
    }
    return best;
  }
}
