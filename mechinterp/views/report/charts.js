// The two small pictures: faithfulness against size, and scores by layer and head.

function drawCurve(place, readout, curve, choose) {
  const W = 560, H = 300, left = 46, right = 14, top = 14, bottom = 40;
  const points = curve.points.filter(([n]) => n > 0), { circuit, random } = curve;
  const sizes = [...points.map(([n]) => n), circuit.n_edges, curve.n_graph];
  const values = [...points.map(([, v]) => v), ...random, ...circuit.ci, circuit.value, 0, 1];
  const [x0, x1] = [Math.log(Math.max(1, Math.min(...sizes))), Math.log(Math.max(2, ...sizes))];
  const room = (Math.max(...values) - Math.min(...values)) * 0.06;
  const [y0, y1] = [Math.min(...values) - room, Math.max(...values) + room];
  const x = (n) => left + ((Math.log(n) - x0) / (x1 - x0 || 1)) * (W - left - right);
  const y = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `Faithfulness of ${count(points.length, "size")}; the circuit: ${number(circuit.value)} with ${count(circuit.n_edges, "edge")}` });
  const text = (at, words, more = {}) => shape("text", { x: at[0], y: at[1], ...more }, words);
  const step = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 100, 1e4, 1e6].find((s) => (y1 - y0) / s <= 8) ?? (y1 - y0);
  for (let v = Math.ceil(y0 / step) * step; v <= y1; v += step) {
    const guide = Math.abs(v) < step / 9 || Math.abs(v - 1) < step / 9 ? "guide" : "";
    svg.append(shape("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), class: `grid ${guide}` }), text([left - 6, y(v) + 4], number(Math.round(v / step) * step, 3), { "text-anchor": "end" }));
  }
  for (let power = 0; power < 12; power++) for (const first of [1, 3]) {
    const n = first * 10 ** power, at = x(n);
    if (at >= left && at <= W - right) svg.append(shape("line", { x1: at, x2: at, y1: H - bottom, y2: H - bottom + 4, class: "grid" }), text([at, H - bottom + 17], n.toLocaleString("en"), { "text-anchor": "middle" }));
  }
  svg.append(
    text([(left + W) / 2, H - 5], `edges kept (of ${curve.n_graph.toLocaleString("en")})`, { "text-anchor": "middle" }),
    text([left + 4, y(1) - 5], "full model"), text([W - right, y(0) - 5], "every edge replaced", { "text-anchor": "end" }),
  );
  if (points.length > 1) svg.append(shape("polyline", { points: points.map(([n, v]) => `${x(n)},${y(v)}`).join(" "), class: "curve" }));
  const marks = [];
  for (const [n, v] of points) marks.push([n, v, `${count(n, "edge")}: faithfulness ${v.toFixed(3)} (${curve.pairs} pairs)`, shape("circle", { cx: x(n), cy: y(v), r: 3, class: "point" })]);
  for (const v of random) {
    const [a, b] = [x(circuit.n_edges), y(v)];
    marks.push([circuit.n_edges, v, `a random circuit of this size: ${v.toFixed(3)} (${circuit.pairs} pairs)`, shape("path", { d: `M${a - 4} ${b - 4}l8 8m0 -8l-8 8`, class: "random" })]);
  }
  const [a, b] = [x(circuit.n_edges), y(circuit.value)], [low, high] = circuit.ci.map(y);
  marks.push([circuit.n_edges, circuit.value, `this circuit, ${count(circuit.n_edges, "edge")}: ${circuit.value.toFixed(3)} [${circuit.ci[0].toFixed(3)}, ${circuit.ci[1].toFixed(3)}] (${Math.round(circuit.level * 100)} % interval, ${circuit.pairs} pairs)`,
    shape("path", { d: `M${a} ${low}V${high}m-4 0h8M${a - 4} ${low}h8M${a} ${b - 6}l6 6l-6 6l-6 -6z`, class: "chosen" })]);
  svg.append(...marks.map((mark) => mark[3]));
  const ring = shape("circle", { r: 7, class: "ring", visibility: "hidden" });
  svg.append(ring);
  const usual = [`Diamond: this circuit with its ${Math.round(circuit.level * 100)} % interval on the ${circuit.pairs} pairs.`, points.length ? `Line: the best edges on the ${curve.pairs} pairs.` : "", random.length ? `Crosses: ${random.length} random circuits of its size.` : ""].filter(Boolean).join(" ");
  const near = (event) => {
    const box = svg.getBoundingClientRect(), k = W / box.width, [px, py] = [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
    const found = marks.map((mark) => [Math.hypot(x(mark[0]) - px, y(mark[1]) - py), mark]).sort((p, q) => p[0] - q[0])[0];
    return found[0] < 25 ? found[1] : undefined;
  };
  svg.addEventListener("pointermove", (event) => { readout.textContent = near(event)?.[2] ?? usual; });
  svg.addEventListener("pointerleave", () => { readout.textContent = usual; });
  svg.addEventListener("click", (event) => {
    const mark = near(event);
    if (mark) choose(mark[0]);
  });
  readout.textContent = usual;
  place.append(svg);
  return (stop) => {
    const value = stop.faithfulness ?? stop.held_out?.value ?? null;
    ring.setAttribute("visibility", value === null || !stop.n_edges ? "hidden" : "visible");
    if (value === null || !stop.n_edges) return;
    ring.setAttribute("cx", x(stop.n_edges));
    ring.setAttribute("cy", y(value));
  };
}

function drawHeat(place, readout, heat, choose) {
  const n = heat.rows.length, m = heat.columns.length, left = 34;
  const cell = Math.max(14, Math.min(44, Math.floor(500 / m))), tall = Math.max(14, Math.min(34, Math.floor(560 / n)));
  const largest = Math.max(...heat.rows.flat().map(([, v]) => Math.abs(v))) || 1, chosen = new Set(heat.chosen);
  const svg = shape("svg", { viewBox: `0 0 ${left + m * cell + 4} ${n * tall + 38}`, class: "chart heat", role: "group", "aria-label": "Scores by layer and head" });
  svg.style.maxWidth = `${left + m * cell + 4}px`;
  heat.rows.forEach((row, layer) => {
    const top = (n - 1 - layer) * tall;
    if (n <= 40 || layer % 4 === 0) svg.append(shape("text", { x: left - 6, y: top + tall / 2 + 4, "text-anchor": "end" }, String(layer)));
    row.forEach(([name, value], k) => {
      if (!name) return;
      const group = shape("g", { "data-heat": name }), at = left + k * cell;
      group.append(
        shape("rect", { x: at, y: top, width: cell - 1, height: tall - 1, class: "ground" }),
        shape("rect", { x: at, y: top, width: cell - 1, height: tall - 1, class: value < 0 ? "loss" : "gain", "fill-opacity": (Math.abs(value) / largest).toFixed(3) }),
      );
      if (n * m <= 80 && cell >= 34) group.append(shape("text", { x: at + cell / 2, y: top + tall / 2 + 4, "text-anchor": "middle", class: Math.abs(value) > 0.55 * largest ? "strong" : "" }, number(value, 2)));
      if (chosen.has(name)) group.append(shape("circle", { cx: at + cell - 6, cy: top + 5, r: 2.5, class: "dot" }));
      group.addEventListener("pointerenter", () => { readout.textContent = `${name}: ${signed(value)}${chosen.has(name) ? "" : " (not in the circuit)"}`; });
      group.addEventListener("click", () => choose(name));
      svg.append(group);
    });
  });
  heat.columns.forEach((label, k) => {
    if (m <= 24 || k % 4 === 0 || label === "MLP") svg.append(shape("text", { x: left + (k + 0.5) * cell, y: n * tall + 14, "text-anchor": "middle" }, label));
  });
  svg.append(shape("text", { x: left + (m * cell) / 2, y: n * tall + 32, "text-anchor": "middle" }, "head; layers grow upward"));
  const usual = `The darkest cell is ${number(largest, 3)} (${heat.metric}). Click a cell to see the paths through its node.`;
  svg.addEventListener("pointerleave", () => { readout.textContent = usual; });
  readout.textContent = usual;
  place.append(svg);
}
