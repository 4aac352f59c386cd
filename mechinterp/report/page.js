"use strict";
// Draws every figure of the page, and dims the edges that do not touch the node under the mouse.
for (const source of document.querySelectorAll("script[type='application/json'][data-figure]")) {
  const target = document.getElementById(source.dataset.figure);
  const figure = JSON.parse(source.textContent);
  const config = { responsive: figure.layout.width === undefined, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  Plotly.newPlot(target, figure.data, figure.layout, config).then(() => {
    const dim = (name) => {
      for (const line of target.querySelectorAll(".scatterlayer .trace")) {
        const trace = line.__data__[0].trace;
        if (!Array.isArray(trace.meta)) continue;
        const touches = name === undefined || trace.meta[1] === name || trace.meta[2] === name;
        line.style.opacity = touches ? trace.opacity : 0.07;
      }
    };
    target.on("plotly_hover", (event) => dim(event.points[0].customdata));
    target.on("plotly_unhover", () => dim(undefined));
  });
}
