// A heat map that is read with a pointer, a finger or the keyboard: hover or arrow keys say what a cell holds, a click
// or Enter opens it.
"use strict";

const CELL = { least: 13, most: 34 }; // px

/**
 * A heat map in a host; `update` takes
 *   rows, columns: labels; rowNames, columnNames: the same in full; z[i][j]: number or null; lines(i, j): [words, value];
 *   range: [low, high]; reversed: whether small is much; bar, xtitle, ytitle, label: words; marks(i, j): whether a cell
 *   is crossed; tree: lines of a dendrogram above; open(i, j): what a click does, if anything.
 */
function heatMap(host) {
  const map = element("div", { class: "map", tabindex: "0", role: "application" });
  const readout = element("p", { class: "readout", role: "status", "aria-live": "polite" });
  const legend = element("details", { class: "names" });
  fill(host, map, readout, legend);
  let spec = null;
  let at = [0, 0];

  function say() {
    const [i, j] = at;
    const words = spec.lines(i, j).map(([name, value]) => `${name} ${value}`).join("; ");
    readout.textContent = `${spec.rowNames[i]} × ${spec.columnNames[j]}: ${words}`;
  }
  function frame(colours) {
    const [i, j] = at;
    const line = { color: colours.orange, width: 3 };
    return [{ type: "rect", x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line }];
  }
  function go(i, j) {
    at = [Math.min(Math.max(i, 0), spec.rows.length - 1), Math.min(Math.max(j, 0), spec.columns.length - 1)];
    Plotly.relayout(map, { shapes: frame(theme()) });
    say();
  }
  map.addEventListener("keydown", (event) => {
    const [i, j] = at;
    const last = spec ? spec.columns.length - 1 : 0;
    const moves = { ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1] };
    Object.assign(moves, { Home: [i, 0], End: [i, last] });
    if (!spec) return;
    if (event.key in moves) go(...moves[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && spec.open) spec.open(i, j);
    else return;
    event.preventDefault();
  });
  map.addEventListener("focus", () => spec && say());

  function drawn(width, colours) {
    return { data: traces(spec, width, colours), layout: { ...layoutOf(spec, width, colours), shapes: frame(colours) } };
  }
  function update(wanted) {
    const first = spec === null;
    spec = wanted;
    at = at[0] < spec.rows.length && at[1] < spec.columns.length ? at : [0, 0];
    readout.textContent = "";
    map.setAttribute("aria-label", `${spec.label} Arrow keys move from cell to cell`
      + (spec.open ? ", Enter opens a cell." : "."));
    fill(legend, element("summary", {}, "What the numbers at the axes stand for"), numbered(spec));
    plot(map, drawn);
    if (!first) return;
    map.on("plotly_click", (event) => {
      const { x, y, curveNumber } = event.points[0];
      if (curveNumber !== 0) return;
      go(y, x);
      if (spec.open) spec.open(y, x);
    });
  }
  return { update, map, leave: () => { unplot(map); spec = null; fill(host); }, focus: () => map.focus() };
}

/** Lists of the names behind the numbers that a narrow screen has at its axes. */
function numbered(spec) {
  const list = (title, names) => [element("p", {}, title),
    element("ol", {}, names.map((name) => element("li", {}, name)))];
  const same = String(spec.rowNames) === String(spec.columnNames);
  return [...list(same ? "Rows and columns" : "Rows", spec.rowNames), ...(same ? [] : list("Columns", spec.columnNames))];
}

function traces(spec, width, colours) {
  const text = spec.z.map((row, i) => row.map((_, j) => [
    `<b>${safe(spec.rowNames[i])}</b> ×`, `<b>${safe(spec.columnNames[j])}</b>`,
    ...spec.lines(i, j).map(([name, value]) => `${safe(name)}: ${safe(value)}`),
  ].join("<br>")));
  const narrow = width < NARROW;
  const main = {
    type: "heatmap", z: spec.z, text, hovertemplate: "%{text}<extra></extra>", hoverongaps: true,
    zmin: spec.range[0], zmax: spec.range[1], colorscale: "Viridis", reversescale: Boolean(spec.reversed),
    xgap: 1, ygap: 1,
    colorbar: {
      title: { text: spec.bar, side: narrow ? "top" : "right" }, thickness: 12, outlinewidth: 0,
      ...(narrow ? { orientation: "h", y: 1, yanchor: "bottom", len: 1 } : { len: 1 }),
    },
  };
  const crossed = { x: [], y: [] };
  spec.z.forEach((row, i) => row.forEach((value, j) => {
    if (there(value) && spec.marks && spec.marks(i, j)) {
      crossed.x.push(j);
      crossed.y.push(i);
    }
  }));
  const cross = {
    type: "scatter", mode: "markers", ...crossed, hoverinfo: "skip", showlegend: false,
    marker: { symbol: "x-thin", size: 7, line: { width: 1.5, color: "#ffffff" } },
  };
  const tree = (spec.tree || []).map((line) => ({
    type: "scatter", mode: "lines", x: line.x, y: line.y, xaxis: "x", yaxis: "y2", hoverinfo: "skip",
    showlegend: false, line: { color: colours.quiet, width: 1.2 },
  }));
  return [main, cross, ...tree];
}

function layoutOf(spec, width, colours) {
  const narrow = width < NARROW;
  const longest = (labels) => Math.max(...labels.map((label) => String(label).length));
  const left = narrow ? 44 : Math.min(36 + 6.2 * longest(spec.rows), 240);
  const bottom = narrow ? 50 : Math.min(46 + 4.8 * longest(spec.columns), 210);
  const right = narrow ? 8 : 84;
  const top = narrow ? 76 : 14;
  const room = (width - left - right) / spec.columns.length;
  const cell = Math.min(Math.max(room, CELL.least), CELL.most);
  const above = spec.tree ? 90 : 0;
  const inside = Math.max(spec.rows.length * Math.min(cell, room * 1.2 + 4), 120);
  const axis = (labels) => ({
    tickvals: labels.map((_, place) => place),
    ticktext: labels.map((label, place) => (narrow ? String(place + 1) : safe(label))),
    showgrid: false, zeroline: false, ticks: "", tickfont: { size: 11 }, automargin: !narrow,
  });
  const share = inside / (inside + above);
  return {
    height: Math.round(inside + above + top + bottom),
    margin: { l: left, r: right, t: top, b: bottom },
    plot_bgcolor: colours.none,
    showlegend: false,
    xaxis: { ...axis(spec.columns), title: { text: safe(spec.xtitle), standoff: 8 }, range: [-0.5, spec.columns.length - 0.5],
      tickangle: narrow ? 0 : -60 },
    yaxis: { ...axis(spec.rows), title: { text: safe(spec.ytitle), standoff: 8 }, range: [spec.rows.length - 0.5, -0.5],
      domain: [0, share] },
    ...(spec.tree ? { yaxis2: { domain: [share + 0.01, 1], showgrid: false, zeroline: false, rangemode: "tozero",
      title: { text: narrow ? "" : "dissim." , font: { size: 11 } }, tickfont: { size: 10 }, nticks: 4 } } : {}),
  };
}
