// The universality study: the plane of two models, depth, the ruler and stitching, all of one comparison that the
// switches choose.
"use strict";

const SHOWN = [["similarity", "raw"], ["u", "calibrated (u)"], ["ceiling", "ceiling"], ["floor", "floor"]];
const PARTS = [["encoder", "encoders"], ["decoder", "decoders"], ["all", "all sites"]];
const POLICIES = { gap: "mean over space (gap)", mask: "mean weighted by the answer (mask)" };
const U_RANGE = [-0.5, 1.5]; // of the colours; values beyond have the end's colour
const TOLD_APART = 0.05;

const inPolicyWords = (policy) => POLICIES[policy]
  || policy.replace(/^grid:(\d+)$/, "cells of a $1 × $1 grid as rows (grid:$1)").replace(/^flat:(\d+)$/,
    "cells of a $1 × $1 grid as features (flat:$1)");

const comparisons = DATA.planes.map((entry) => ({
  ...entry,
  pairs: unpack(entry.pairs),
  depth: entry.depth ? unpack(entry.depth) : [],
  summary: entry.summary ? unpack(entry.summary) : [],
  sites: entry.sites ? unpack(entry.sites) : [],
}));
const chosen = { run: 0, estimator: null, policy: null, part: "encoder", shown: "similarity" };
const plane = comparisons.length ? heatMap(byId("plane-map")) : null;

const current = () => comparisons[chosen.run];
const isDistance = (entry, estimator) => entry.distances.includes(estimator);

/** Keep the choice among what the run has. */
function settle() {
  const { pairs } = current();
  const policies = unique(pairs.map((row) => row.policy));
  if (!policies.includes(chosen.policy)) chosen.policy = policies[0];
  const estimators = unique(pairs.filter((row) => row.policy === chosen.policy).map((row) => row.estimator));
  if (!estimators.includes(chosen.estimator)) chosen.estimator = estimators[0];
  return { policies, estimators };
}

function showComparison() {
  if (!comparisons.length) {
    const words = "The universality study has not run, or its tables cannot be read (see the last section). Its command:";
    fill(byId("plane-map"), missing(words, "python experiments.py"));
    byId("details").hidden = true;
    for (const name of ["depth-plot", "ruler-plot", "stitching-plot"]) {
      fill(byId(name), missing("Shown where the universality study has run."));
    }
    return;
  }
  const { policies, estimators } = settle();
  const change = (key) => (value) => {
    chosen[key] = key === "run" ? Number(value) : value;
    if (key === "run") closeDetails();
    showComparison();
  };
  const runs = comparisons.map((entry, place) => [String(place), `${entry.names.join(" and ")}: ${entry.folder}`]);
  place(byId("switches"),
    select("Comparison", runs, String(chosen.run), change("run")),
    select("Measure", estimators.map((name) => [name, name]), chosen.estimator, change("estimator")),
    select("Spatial policy", policies.map((name) => [name, inPolicyWords(name)]), chosen.policy, change("policy")),
    radios("Sites", "part", PARTS, chosen.part, change("part")),
    radios("Value", "shown", SHOWN, chosen.shown, change("shown")));
  showPlane();
  showDepth();
  showRuler();
  showStitching();
}

const measured = (rows) => rows.filter((row) => row.estimator === chosen.estimator && row.policy === chosen.policy);

function planeRows() {
  const both = (row) => chosen.part === "all" || (row.part_a === chosen.part && row.part_b === chosen.part);
  return measured(current().pairs).filter(both);
}

/** What hovering a cell, or standing on it, says. */
function factsOf(row) {
  if (!row) return [["value", "was not computed"]];
  return [
    ["value", withInterval(row, "similarity")], ["p", number(row.p_value)], ["q", number(row.q_value)],
    ["null", `${number(row.null_mean)}, 95 % below ${number(row.null_high)}`],
    ["ceiling", withInterval(row, "ceiling")], ["floor", withInterval(row, "floor")], ["u", withInterval(row, "u")],
    ...(row.verdict ? [["verdict", row.verdict]] : []),
  ];
}

function rangeOf(entry, values) {
  if (chosen.shown === "u") return U_RANGE;
  const numbers = values.flat().filter(there);
  if (isDistance(entry, chosen.estimator)) return [0, Math.max(...numbers, 0.001)];
  return [Math.min(0, ...numbers), Math.max(1, ...numbers)];
}

const shownWords = () => (chosen.shown === "similarity" ? chosen.estimator : `${chosen.shown} of ${chosen.estimator}`);

function showPlane() {
  const entry = current();
  const rows = planeRows();
  const [left, right] = ["site_a", "site_b"].map((side) => unique(rows.map((row) => row[side])));
  const cells = new Map(rows.map((row) => [`${row.site_a}\n${row.site_b}`, row]));
  const cell = (i, j) => cells.get(`${left[i]}\n${right[j]}`);
  if (!rows.length) {
    plane.leave();
    fill(byId("plane-map"), missing("These sites were not compared by this measure under this policy."));
    byId("plane-caption").textContent = "";
    return;
  }
  if (!byId("plane-map").contains(plane.map)) Object.assign(plane, heatMap(byId("plane-map")));
  const z = left.map((_, i) => right.map((_, j) => (cell(i, j) ? cell(i, j)[chosen.shown] : null)));
  const distance = isDistance(entry, chosen.estimator);
  plane.update({
    rows: left.map((name) => entry.short.site_a[name]), columns: right.map((name) => entry.short.site_b[name]),
    rowNames: left, columnNames: right, z, lines: (i, j) => factsOf(cell(i, j)),
    range: rangeOf(entry, z), reversed: distance && chosen.shown !== "u", bar: shownWords(),
    xtitle: `${entry.names[1]} site`, ytitle: `${entry.names[0]} site`,
    marks: (i, j) => there(cell(i, j).q_value) && cell(i, j).q_value > TOLD_APART,
    open: (i, j) => openDetails(entry, cell(i, j), plane),
    label: `Heat map of ${shownWords()}: sites of ${entry.names[0]} by sites of ${entry.names[1]}.`,
  });
  byId("plane-caption").textContent = `${aboutImages(entry)}${shownWords()}`
    + `${distance ? " (a distance: smaller is more similar)" : ""}; ${inPolicyWords(chosen.policy)}; n = `
    + `${rows[0].n_images} test images, mean over pairs of networks${seedsOf(entry)}. Intervals: 95 %, delete-d `
    + `jackknife. Null: ${entry.permutations ?? "some"} permutations of the images of one side. White crosses: not told `
    + `from chance (q > ${TOLD_APART}, Benjamini–Hochberg over all pairs of sites). Sites in order of execution`
    + `${chosen.shown === "u" ? `; colours end at u = ${U_RANGE.join(" and ")}, and where the ceiling is not above the `
      + "floor there is no u" : ""}.`;
}

const seedsOf = (entry) => (Array.isArray(entry.seeds) ? ` of seeds ${entry.seeds.join(", ")}` : "");

// ---------------------------------------------------------------------------------------------------------- depth

/** Neighbouring points of a band that have both ends, as closed outlines. */
function bands(rows, name) {
  const runs = [[]];
  for (const row of rows) {
    if (there(row[`${name}_low`]) && there(row[`${name}_high`])) runs.at(-1).push(row);
    else runs.push([]);
  }
  return runs.filter((run) => run.length > 1).map((run) => ({
    x: [...run, ...[...run].reverse()].map((row) => row.relative_depth),
    y: [...run.map((row) => row[`${name}_high`]), ...[...run].reverse().map((row) => row[`${name}_low`])],
  }));
}

function errorBars(rows, name, colour) {
  return {
    type: "data", symmetric: false, color: colour, thickness: 1.2, width: 3,
    array: rows.map((row) => (there(row[`${name}_high`]) ? row[`${name}_high`] - row[name] : 0)),
    arrayminus: rows.map((row) => (there(row[`${name}_low`]) ? row[name] - row[`${name}_low`] : 0)),
  };
}

function depthTraces(rows, axis, colours, first) {
  const common = { xaxis: `x${axis}`, yaxis: `y${axis}`, type: "scatter" };
  const text = rows.map((row) => [`<b>${safe(row.site_a)}</b> ×`, `<b>${safe(row.site_b)}</b>`,
    `relative depth: ${number(row.relative_depth)}`,
    ...factsOf(row).filter(([name]) => !["p", "q", "null"].includes(name))
      .map(([name, value]) => `${safe(name)}: ${safe(value)}`)].join("<br>"));
  const main = chosen.shown === "u" ? "u" : "similarity";
  const found = [];
  const scales = main === "u" ? [] : [["ceiling", colours.green, "dash"], ["floor", colours.quiet, "dot"]];
  for (const [name, colour, dash] of scales) {
    for (const band of bands(rows, name)) {
      found.push({ ...common, ...band, mode: "lines", fill: "toself", line: { width: 0 }, hoverinfo: "skip",
        fillcolor: name === "ceiling" ? colours.band : colours.floor, showlegend: false });
    }
    found.push({ ...common, name, mode: "lines+markers", x: rows.map((row) => row.relative_depth),
      y: rows.map((row) => row[name]), line: { color: colour, dash, width: 2 }, marker: { size: 4 },
      hoverinfo: "skip", showlegend: first });
  }
  found.push({ ...common, name: main === "u" ? "u" : chosen.estimator, mode: "lines+markers", text,
    x: rows.map((row) => row.relative_depth), y: rows.map((row) => row[main]), showlegend: first,
    hovertemplate: "%{text}<extra></extra>", line: { color: colours.orange, width: 2.5 }, marker: { size: 7 },
    error_y: errorBars(rows, main, colours.orange) });
  return found;
}

function showDepth() {
  const host = byId("depth-plot");
  const entry = current();
  const rows = measured(entry.depth).sort((a, b) => a.relative_depth - b.relative_depth);
  const parts = PARTS.slice(0, 2).filter(([part]) => (chosen.part === "all" || chosen.part === part)
    && rows.some((row) => row.part_a === part));
  host.className = "plot";
  if (!parts.length) {
    unplot(host);
    fill(host, missing("There is no table of depth for this measure, policy and part."));
    byId("depth-caption").textContent = "";
    return;
  }
  if (!plots.has(host)) fill(host);
  const title = chosen.shown === "u" ? "u (0 floor, 1 ceiling)" : chosen.estimator;
  host.setAttribute("role", "img");
  host.setAttribute("aria-label", `${title} by relative depth, with ceiling and floor`);
  plot(host, (width, colours) => {
    const layout = { height: 300 * parts.length + 60, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      margin: { l: 56, r: 12, t: 40, b: 48 }, shapes: [], hovermode: "closest" };
    const data = parts.flatMap(([part, words], place) => {
      const axis = place ? place + 1 : "";
      const share = 1 / parts.length;
      layout[`xaxis${axis}`] = { anchor: `y${axis}`, range: [-0.03, 1.03],
        title: { text: `relative depth in the ${words}${width < NARROW ? "" : " (0 first site, 1 last)"}` } };
      layout[`yaxis${axis}`] = { domain: [1 - (place + 1) * share + (place + 1 < parts.length ? 0.12 : 0),
        1 - place * share], title: { text: safe(title) }, ...(chosen.shown === "u" ? { range: [-1, 2] } : {}) };
      if (chosen.shown === "u") {
        layout.shapes.push({ type: "rect", xref: `x${axis}`, yref: `y${axis}`, x0: -0.03, x1: 1.03, y0: 0, y1: 1,
          fillcolor: colours.band, line: { width: 0 }, layer: "below" });
      }
      return depthTraces(rows.filter((row) => row.part_a === part), axis, colours, place === 0);
    });
    return { data, layout };
  });
  byId("depth-caption").textContent = `${aboutImages(entry)}Each ${entry.names[0]} site with the ${entry.names[1]} site `
    + `at the nearest relative depth, a rule fixed before looking; ${inPolicyWords(chosen.policy)}; n = `
    + `${rows[0].n_images} test images, mean over pairs of networks. Bars and bands: 95 % intervals`
    + `${chosen.shown === "u" ? "; the axis ends at −1 and 2, and the band runs from floor to ceiling" : ""}.`;
}

// ---------------------------------------------------------------------------------------------- ruler and stitching

function showRuler() {
  const host = byId("ruler-plot");
  const entry = current();
  const rows = entry.summary.filter((row) => chosen.part === "all" || row.part === chosen.part);
  host.className = "plot";
  fill(byId("ruler-table"));
  if (!rows.length) {
    unplot(host);
    fill(host, missing("This run has no summary.csv."));
    return;
  }
  if (!plots.has(host)) fill(host);
  const names = rows.map((row) => `${row.part}, ${row.estimator}${row.policy === "gap" ? "" : `, ${row.policy}`}`);
  const lasts = names.map((_, place) => place);
  host.setAttribute("role", "img");
  host.setAttribute("aria-label", "Similarity between floor and ceiling, by measure; the same numbers are in the table");
  plot(host, (width, colours) => {
    const narrow = width < NARROW;
    const points = (key, symbol, colour) => ({ type: "scatter", mode: "markers", name: key, x: rows.map((row) => row[key]),
      y: lasts, marker: { symbol, size: 10, color: colour }, hoverinfo: "skip" });
    const scale = { type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip",
      x: rows.flatMap((row) => [row.floor, row.ceiling, null]), y: lasts.flatMap((place) => [place, place, null]),
      line: { color: colours.line, width: 8 } };
    const text = rows.map((row, place) => [`<b>${safe(names[place])}</b>`,
      ...factsOf(row).filter(([name]) => name !== "q").map(([name, value]) => `${safe(name)}: ${safe(value)}`)].join("<br>"));
    const main = { ...points("similarity", "circle", colours.orange), text, hovertemplate: "%{text}<extra></extra>",
      error_x: errorBars(rows, "similarity", colours.orange) };
    const data = [scale, points("floor", "triangle-up", colours.quiet), points("ceiling", "diamond", colours.green), main];
    return { data, layout: { height: 100 + 30 * rows.length, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      margin: { l: narrow ? 158 : 230, r: 12, t: 40, b: 44 }, xaxis: { title: { text: "similarity" } },
      yaxis: { tickvals: lasts, ticktext: names.map(safe), range: [rows.length - 0.5, -0.5],
        tickfont: { size: narrow ? 9 : 11 } } } };
  });
  const columns = [["what", (row) => names[rows.indexOf(row)]], ["similarity", (row) => withInterval(row, "similarity")],
    ["null 95 %", (row) => number(row.null_high)], ["p", (row) => number(row.p_value)],
    ["floor", (row) => withInterval(row, "floor")], ["ceiling", (row) => withInterval(row, "ceiling")],
    ["u", (row) => withInterval(row, "u")], ["verdict", (row) => row.verdict ?? NONE]];
  fill(byId("ruler-table"), element("details", {}, element("summary", {}, "The same as a table"),
    tableOf(rows, columns, "The ruler as a table")));
  byId("ruler-caption").textContent = `${aboutImages(entry)}Mean over pairs of sites at matched relative depth; n = `
    + `${rows[0].n_images} test images; 95 % intervals over ${rows[0].interval_over ?? "images"}. Grey bar: from floor to `
    + "ceiling. Null: permuted images of one side, in the table.";
}

function showStitching() {
  const host = byId("stitching-plot");
  const entry = current();
  const found = DATA.stitching.find((each) => each.folder === entry.folder);
  host.className = "plot";
  byId("stitching-caption").textContent = "";
  if (!found) {
    unplot(host);
    fill(host, missing("This run has no stitched networks (two seeds and stitch_pairs above 0 are needed)."));
    return;
  }
  if (!plots.has(host)) fill(host);
  const rows = unpack(found.table);
  const short = (name) => String(name).split(".").slice(-2).join(".");
  const kinds = { cross: "from the other architecture", twin: "from another seed", untrained: "from an untrained network" };
  const names = rows.map((row) => `into ${row.receiver} at ${short(row.site_b)}, ${kinds[row.kind] ?? row.kind}`);
  host.setAttribute("role", "img");
  host.setAttribute("aria-label", "Share of its Dice that a network keeps when stitched");
  plot(host, (width, colours) => {
    const narrow = width < NARROW;
    const y = rows.map((_, place) => place);
    const palette = { cross: colours.orange, twin: colours.green };
    const text = rows.map((row, place) => [`<b>${safe(names[place])}</b>`, `giver: ${safe(row.giver ?? NONE)}`,
      `at ${safe(row.site_a ?? NONE)}`, `kept: ${number(row.kept)} (${number(row.low)} … ${number(row.high)})`,
      `Dice: ${number(row.dice)} of ${number(row.dice_own)}`, `site's mean alone keeps: ${number(row.without)}`].join("<br>"));
    const bars = { type: "bar", orientation: "h", x: rows.map((row) => row.kept), y, text, textposition: "none",
      hovertemplate: "%{text}<extra></extra>", name: "kept", marker: { color: rows.map((row) => palette[row.kind] ?? colours.quiet) },
      error_x: { ...errorBars(rows.map((row) => ({ kept: row.kept, kept_low: row.low, kept_high: row.high })), "kept",
        colours.ink) } };
    const without = { type: "scatter", mode: "markers", name: "site's mean alone", x: rows.map((row) => row.without), y,
      hoverinfo: "skip", marker: { symbol: "line-ns", size: 14, line: { width: 3, color: colours.ink } } };
    const wrapped = names.map((name) => safe(name).replace(", from", ",<br>from"));
    return { data: [bars, without], layout: { height: 110 + 40 * rows.length, showlegend: false, bargap: 0.35,
      margin: { l: narrow ? 150 : 330, r: 12, t: 10, b: 60 }, xaxis: { title: { text: "share of own Dice kept" },
        rangemode: "tozero" }, yaxis: { tickvals: y, ticktext: narrow ? wrapped.map((name) => name.replace(" at ", "<br>at "))
        : wrapped, range: [rows.length - 0.5, -0.5], tickfont: { size: narrow ? 8.5 : 11 } } } };
  });
  byId("stitching-caption").textContent = `${aboutImages(found)}One 1 × 1 convolution is trained from the giver's site into `
    + `the receiver's; share of the receiver's own mean Dice on n = ${rows[0].images ?? "?"} test images, 95 % bootstrap. `
    + "Upright line: what is kept when the site holds its mean over images only; where that is much, skip connections do "
    + "the work and the stitch says little.";
}
