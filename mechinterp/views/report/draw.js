"use strict";
// Draws the graph: nodes, rows and columns as SVG, lines on a canvas. Knows nothing of what is chosen or pointed at.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 72, GRID_ROW = 48, LEFT = 84, TOP = 16, NODE_HALF = 0.2, NODE_HEIGHT = 24;
const WIDTHS = [0.7, 6], MAX_PIXELS = 24e6, AT_ONCE = 2000, PER_FRAME = 3000;

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

// The lines of the page as [writer, reader, channel, name, score, share of resamples].
function unpacked(graph) {
  const { from, to, channel, channels, reader, readers, score, frequency } = graph.lines, nodes = graph.nodes;
  return from.map((a, i) => {
    const name = graph.level === "node" ? `${nodes[a].name} -> ${nodes[to[i]].name}` : `${nodes[a].bare}->${readers[reader[i]]}`;
    return [a, to[i], channels[channel[i]], name, score[i], frequency[i] ?? null];
  });
}

class Drawing {
  // `room` is the width to fill, `zoom` a factor on all distances.
  constructor(graph, room, zoom) {
    Object.assign(this, { graph, room, zoom, data: graph.drawing, nodes: new Map(), curves: new Map(), points: new Map() });
    const { columns, rows, led, range: [low, high] } = this.data, names = Object.keys(this.data.places).map(Number);
    this.label = (i) => (columns.length ? graph.nodes[i].bare : graph.nodes[i].name);
    const widest = Math.max(36, ...names.map((i) => this.nodeWidth(i))), n = rows.length;
    const least = columns.length || !led ? widest + 4 : Math.max(80, widest / 0.54);
    this.unit = Math.max(Math.min(least, led ? least : widest + 8), Math.min(2.2 * least, (room - LEFT) / (high - low + 1))) * zoom;
    this.row = (led || columns.length ? Math.max(GRID_ROW, Math.min(ROW, 1300 / n)) : GRID_ROW) * zoom;
    this.width = LEFT + (high - low + 1) * this.unit;
    this.top = TOP + (columns.length ? 14 : 0);
    this.height = this.top * 2 + n * this.row;
    this.x = (x) => LEFT + (x - low + 0.5) * this.unit;
    this.y = (y) => this.top + (n - 0.5 - y) * this.row;
    this.largest = graph.edges.reduce((most, edge) => Math.max(most, Math.abs(edge[4] ?? 0)), 0);
    this.boxes = shape("g", { class: "boxes" });
    this.svg = shape("svg", {
      width: Math.round(this.width),
      height: Math.round(this.height),
      role: "group",
      "aria-label": "The circuit as a graph; arrow keys go from node to node, Enter shows the paths through one",
    }, this.rows(), this.boxes);
    this.base = this.canvas("lines");
    this.hot = this.canvas("hot");
    this.stack = element("div", { class: "stack" }, this.base, this.hot, this.svg);
    this.stack.style.width = `${Math.round(this.width)}px`;
    this.stack.style.height = `${Math.round(this.height)}px`;
    for (const i of names) this.addNode(i);
  }

  canvas(name) {
    const ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(MAX_PIXELS / (this.width * this.height)));
    const made = element("canvas", { class: name, width: Math.ceil(this.width * ratio), height: Math.ceil(this.height * ratio), "aria-hidden": "true" });
    made.style.width = `${Math.round(this.width)}px`;
    made.style.height = `${Math.round(this.height)}px`;
    made.ratio = ratio;
    return made;
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

  // The curve of a line, in pixels.
  curve(e) {
    if (!this.curves.has(e)) {
      const [from, to] = this.graph.edges[e], [x0, y0] = this.data.places[from], [x1, y1] = this.data.places[to], xs = this.data.knots[e];
      let found;
      if (xs) found = pieces(knotsOf(xs, y0, y1));
      else {
        const half = NODE_HEIGHT / 2 / this.row, third = Math.max(0.3, (y1 - y0 - 2 * half) / 3);
        found = [[x0, y0 + half, x0, y0 + half + third, x1, y1 - half - third, x1, y1 - half]];
      }
      this.curves.set(e, found.map((curve) => curve.map((value, k) => (k % 2 ? this.y(value) : this.x(value)))));
    }
    return this.curves.get(e);
  }

  share(e) {
    const score = this.graph.edges[e][4];
    return score === null || score === undefined || this.largest === 0 ? null : Math.abs(score) / this.largest;
  }

  clear(canvas) {
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.setTransform(canvas.ratio, 0, 0, canvas.ratio, 0, 0);
    pen.globalCompositeOperation = "source-over";
    return pen;
  }

  // Paints lines, the strong ones on top; `opacity` of a line with its share of the largest score, `colour` of its channel and sign.
  // Of very many the strongest come at once, the others beneath them as thin lines, some in every frame.
  paint(canvas, lines, opacity, colour) {
    const pen = this.clear(canvas), strength = (e) => this.share(e) ?? 0;
    const order = [...lines].sort((a, b) => strength(b) - strength(a) || b - a), rest = order.slice(AT_ONCE);
    const stroke = (e, thin) => {
      const share = this.share(e), width = share === null || thin ? 1.2 - 0.4 * thin : WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * share, [, , channel, , score] = this.graph.edges[e];
      Object.assign(pen, { strokeStyle: colour(channel, score), lineWidth: width, globalAlpha: opacity(e, share ?? 0) });
      pen.setLineDash(score < 0 && !thin ? [4 + width, 3 + 0.6 * width] : []);
      const curves = this.curve(e);
      pen.beginPath();
      pen.moveTo(curves[0][0], curves[0][1]);
      for (const c of curves) pen.bezierCurveTo(c[2], c[3], c[4], c[5], c[6], c[7]);
      pen.stroke();
    };
    for (const e of order.slice(0, AT_ONCE).reverse()) stroke(e, 0);
    cancelAnimationFrame(canvas.next);
    pen.globalCompositeOperation = "destination-over";
    const more = (from) => {
      for (const e of rest.slice(from, from + PER_FRAME)) stroke(e, 1);
      if (from + PER_FRAME < rest.length) canvas.next = requestAnimationFrame(() => more(from + PER_FRAME));
    };
    if (rest.length) canvas.next = requestAnimationFrame(() => more(0));
  }

  // The line nearest to a point of the drawing, among those given; undefined when none is within `reach`.
  nearest(x, y, among, reach) {
    let best, bestDistance = reach * reach;
    for (const e of among) {
      const [from, to] = this.graph.edges[e];
      if (y > this.y(this.data.places[from][1]) + reach || y < this.y(this.data.places[to][1]) - reach) continue;
      if (!this.points.has(e)) this.points.set(e, sampled(this.curve(e), 6));
      const points = this.points.get(e);
      for (let k = 0; k + 3 < points.length; k += 2) {
        const ax = points[k], ay = points[k + 1], dx = points[k + 2] - ax, dy = points[k + 3] - ay;
        if (y > Math.max(ay, ay + dy) + reach || y < Math.min(ay, ay + dy) - reach) continue;
        const along = dx * dx + dy * dy;
        const t = along ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / along)) : 0;
        const distance = (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2;
        if (distance < bestDistance || (distance === bestDistance && best !== undefined)) {
          best = e;
          bestDistance = distance;
        }
      }
    }
    return best;
  }
}
