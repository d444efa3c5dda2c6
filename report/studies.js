// The other studies: the earlier recipe, explanations, processing steps and architectures, each where it has run.
"use strict";

/** Switches of one study: `parts` are functions of the state that make a switch; every change shows the study again. */
function study(name, entries, command, words, show) {
  const state = { run: 0 };
  const again = (key) => (value) => {
    state[key] = key === "run" ? Number(value) : value;
    refresh();
  };
  function refresh() {
    const runs = entries.map((entry, place) => [String(place), entry.folder]);
    const switches = show(entries[state.run], state, again);
    place(byId(`${name}-switches`), runs.length > 1 ? select("Results", runs, String(state.run), again("run")) : null,
      ...switches);
  }
  if (entries.length) refresh();
  else fill(byId(`${name}-${name === "legacy" ? "table" : "map"}`), missing(words, command));
}

/** The state's value if it is among the options, else the first of them. */
function kept(state, key, options) {
  if (!options.includes(state[key])) [state[key]] = options;
  return state[key];
}

const pairKey = (a, b) => `${a}\n${b}`;

/** Rows of a symmetric table by both orders of their two names. */
function symmetric(rows, a, b) {
  return new Map(rows.flatMap((row) => [[pairKey(row[a], row[b]), row], [pairKey(row[b], row[a]), row]]));
}

// ------------------------------------------------------------------------------------------------ the earlier recipe

study("legacy", DATA.legacy, "python experiments.py legacy", "The study of the earlier recipe has not run. Its command:",
  (entry) => {
    const range = (row) => number(row.corrected) + (there(row.corrected_low)
      ? ` (${number(row.corrected_low)} … ${number(row.corrected_high)})` : "");
    const published = (row) => [row.published, row.published_again].filter(there).join(" / ") || NONE;
    const columns = [["pair", (row) => row.pair], ["measure", (row) => row.measure], ["published", published],
      ["recipe here", (row) => number(row.run1)], ["recipe again", (row) => number(row.run2)],
      ["rows cut again", (row) => number(row.run1_cut_again)], ["by the recipe", (row) => row.word ?? NONE],
      ["corrected", range], ["null 95 %", (row) => number(row.null_high)], ["p", (row) => number(row.p_value)],
      ["floor", (row) => number(row.floor)], ["ceiling", (row) => number(row.ceiling)], ["u", (row) => number(row.u)],
      ["verdict", (row) => [row.verdict, row.note].filter(there).join(": ") || NONE]];
    fill(byId("legacy-table"), tableOf(unpack(entry.table), columns, "The earlier recipe beside the corrected protocol"));
    byId("legacy-caption").textContent = `${aboutImages(entry)}Published: other models, images and settings, so no `
      + "difference from it means anything. Recipe here, again: the earlier study's own way of measuring on two trainings; "
      + "rows cut again: the same networks with other random permutations of their rows. Corrected: the same networks and "
      + "images, paired rows, debiased where the measure allows (range over trainings), with null, floor and ceiling.";
    return [];
  });

// ------------------------------------------------------------------------------------------------------ explanations

const explanationMap = DATA.explanations.length ? heatMap(byId("explanations-map")) : null;
const EXPLAINED = [["mean", "raw similarity"], ["u", "calibrated (u)"], ["dissimilarity", "dissimilarity"]];

study("explanations", DATA.explanations, "python experiments.py explanations",
  "The study of explanations has not run. Its command:", (entry, state, again) => {
    entry.rows ??= unpack(entry.pairs);
    const methods = unique(entry.rows.map((row) => row.method));
    const method = kept(state, "method", methods);
    const kinds = unique(entry.rows.filter((row) => row.method === method).map((row) => row.similarity));
    const similarity = kept(state, "similarity", kinds);
    const shown = kept(state, "shown", EXPLAINED.map(([key]) => key));
    const rows = entry.rows.filter((row) => row.method === method && row.similarity === similarity);
    const tree = entry.trees.find((each) => each.method === method && each.similarity === similarity);
    const failing = new Set(entry.failed.filter(([, variant]) => variant === method).map(([network]) => network));
    showExplanations(entry, rows, tree, failing, { method, similarity, shown });
    return [select("Method", methods.map((name) => [name, name]), method, again("method")),
      kinds.length > 1 ? select("Similarity", kinds.map((name) => [name, name]), similarity, again("similarity")) : null,
      radios("Value", "explained", EXPLAINED, shown, again("shown"))];
  });

function showExplanations(entry, rows, tree, failing, { method, similarity, shown }) {
  const { order } = tree;
  const cells = symmetric(rows, "model_a", "model_b");
  const cell = (i, j) => cells.get(pairKey(order[i], order[j]));
  const own = { mean: 1, dissimilarity: 0, u: null }[shown];
  const z = order.map((_, i) => order.map((_, j) => (i === j ? own : cell(i, j)?.[shown] ?? null)));
  const numbers = z.flat().filter(there);
  const ranges = { mean: [Math.min(0, ...numbers), 1], u: U_RANGE, dissimilarity: [0, Math.max(...numbers, 0.001)] };
  const full = order.map((name) => [name, entry.families[name], failing.has(name) ? "method fails here" : null]
    .filter(there).join(", "));
  explanationMap.update({
    rows: order.map((name) => (failing.has(name) ? `${name} !` : name)), columns: order, rowNames: full, columnNames: full,
    z, range: ranges[shown], reversed: shown === "dissimilarity", bar: shown === "mean" ? similarity : shown,
    xtitle: "network", ytitle: "network", tree: tree.lines.length ? tree.lines : null,
    label: `Heat map of the ${shown} of explanations by ${method}, networks by networks in order of their tree.`,
    lines: (i, j) => (i === j ? [["the same network", ""]] : explainedFacts(cell(i, j))),
  });
  const counts = unique(rows.map((row) => row.n).filter(there));
  byId("explanations-caption").textContent = `${aboutImages(entry)}${method}, ${similarity} of two networks' explanations of `
    + `the same image, mean over n = ${counts.join(", ")} images. Chance: maps of different images. Ceiling: two seeds of one `
    + "network. u = (mean − chance) / (ceiling − chance). Above: average-linkage tree of the dissimilarity "
    + `√((1 − mean)² + sd²)${tree.left_out.length ? `; without ${tree.left_out.join(", ")}, which lack a pair` : ""}. `
    + `An exclamation mark: the method fails on that network (${failing.size} of ${order.length}).`;
}

function explainedFacts(row) {
  if (!row) return [["value", "was not computed"]];
  return [["value", number(row.mean)], ["u", number(row.u)], ["chance (null)", number(row.null_mean)],
    ["q", number(row.q)], ["ceiling", number(row.ceiling)], ["dissimilarity", number(row.dissimilarity)],
    ["images", number(row.n)], ["kind", row.kind ?? NONE]];
}

// -------------------------------------------------------------------------------------------------- processing steps

const stepsMap = DATA.steps.length ? heatMap(byId("steps-map")) : null;
const VALUES = { a_to_b: "information imbalance, rows to columns", b_to_a: "information imbalance, columns to rows",
  both: "information imbalance, both ways", linear_cka: "debiased linear CKA", mutual_knn: "mutual nearest neighbours" };
const isImbalance = (name) => ["a_to_b", "b_to_a", "both"].includes(name);

study("steps", DATA.steps, "python experiments.py processing_steps",
  "The study of processing steps has not run, or left no planes. Its command:", (entry, state, again) => {
    const lefts = unique(entry.planes.map((each) => each.a));
    const left = kept(state, "a", lefts);
    const rights = entry.planes.filter((each) => each.a === left).map((each) => each.b);
    const right = kept(state, "b", rights);
    const value = kept(state, "value", entry.values);
    showSteps(entry, entry.planes.find((each) => each.a === left && each.b === right), value);
    return [select("Rows", lefts.map((name) => [name, name]), left, again("a")),
      select("Columns", rights.map((name) => [name, name]), right, again("b")),
      select("Value", entry.values.map((name) => [name, VALUES[name] ?? name]), value, again("value"))];
  });

function showSteps(entry, found, value) {
  entry.facts ??= entry.sites ? unpack(entry.sites) : [];
  entry.pairRows ??= entry.pairs ? unpack(entry.pairs) : [];
  const cells = new Map(found.row_a.map((i, place) => [pairKey(i, found.row_b[place]), place]));
  const at = (name, i, j) => found.values[name][cells.get(pairKey(i, j))] ?? null;
  const z = found.sites_a.map((_, i) => found.sites_b.map((_, j) => at(value, i, j)));
  const numbers = z.flat().filter(there);
  const short = (name) => (name.length > 26 ? `…${name.slice(-25)}` : name);
  const fact = (network, site) => entry.facts.find((row) => row.network === network && row.site === site);
  const side = (network, site, depth) => {
    const row = fact(network, site);
    return [depth === undefined ? null : `depth ${number(depth)}`, row?.axes, row?.shape, row?.place]
      .filter(there).join(", ");
  };
  stepsMap.update({
    rows: found.sites_a.map(short), columns: found.sites_b.map(short), rowNames: found.sites_a, columnNames: found.sites_b,
    z, range: isImbalance(value) ? [0, Math.max(0, ...numbers) || 1] : [Math.min(0, ...numbers), Math.max(1, ...numbers)],
    reversed: isImbalance(value), bar: VALUES[value] ?? value,
    xtitle: found.b, ytitle: found.a, label: `Heat map of ${VALUES[value] ?? value}: sites of ${found.a} by sites of ${found.b}.`,
    lines: (i, j) => [...entry.values.map((name) => [VALUES[name] ?? name, number(at(name, i, j))]),
      [found.a, side(found.a, found.sites_a[i], found.depths_a?.[i])],
      [found.b, side(found.b, found.sites_b[j], found.depths_b?.[j])]],
  });
  const images = entry.pairRows.find((row) => row.network_a === found.a && row.network_b === found.b);
  byId("steps-caption").textContent = `${aboutImages(entry)}${VALUES[value] ?? value} of every site of ${found.a} with every `
    + `site of ${found.b}, in order of depth${there(entry.images) ? `; n = ${entry.images} images` : ""}. `
    + `${isImbalance(value) ? "0: one side tells the other's neighbours; 1: it tells nothing; colours are of this pair alone. " : ""}`
    + `${entry.left_out ? `${entry.left_out} more pairs of networks are in planes.csv, left out here for size.` : ""}`;
  const generic = (rows, label) => tableOf(rows, Object.keys(rows[0]).map((key) => [key, (row) => number(row[key])]), label);
  const more = Object.entries(entry.tables).map(([name, table]) => [name, unpack(table)]);
  const networks = entry.networks ? [["networks", unpack(entry.networks)]] : [];
  fill(byId("steps-facts"), images ? generic([images], `${found.a} and ${found.b}`) : null,
    [...networks, ...more].map(([name, rows]) => element("details", {}, element("summary", {}, `Table: ${name}`),
      generic(rows, name))));
}

// ----------------------------------------------------------------------------------------------------- architectures

const matrixMap = DATA.matrices.length ? heatMap(byId("matrix-map")) : null;

study("matrix", DATA.matrices, "python experiments.py architectures",
  "The study of architectures has not run, or compared none. Its command:", (entry, state, again) => {
    entry.rows ??= unpack(entry.table);
    const parts = unique(entry.rows.map((row) => row.part));
    const part = kept(state, "part", parts);
    const shown = kept(state, "shown", SHOWN.map(([key]) => key));
    showMatrix(entry, entry.rows.filter((row) => row.part === part), part, shown);
    return [radios("Sites", "matrix-part", parts.map((name) => [name, `${name}s`]), part, again("part")),
      radios("Value", "matrix-shown", SHOWN, shown, again("shown"))];
  });

function showMatrix(entry, rows, part, shown) {
  const labels = unique(rows.flatMap((row) => [row.label_a, row.label_b]));
  const cells = symmetric(rows, "label_a", "label_b");
  const cell = (i, j) => cells.get(pairKey(labels[i], labels[j]));
  const z = labels.map((_, i) => labels.map((_, j) => cell(i, j)?.[shown] ?? null));
  const numbers = z.flat().filter(there);
  const full = labels.map((name) => [name, entry.families[name]].filter(there).join(", "));
  matrixMap.update({
    rows: labels, columns: labels, rowNames: full, columnNames: full, z, bar: shown,
    range: shown === "u" ? U_RANGE : [Math.min(0, ...numbers), Math.max(1, ...numbers)], xtitle: "architecture",
    ytitle: "architecture", marks: (i, j) => there(cell(i, j)?.q_value) && cell(i, j).q_value > TOLD_APART,
    label: `Heat map of ${shown} of the ${part}s, architectures by architectures.`,
    lines: (i, j) => [...factsOf(cell(i, j)), ...(cell(i, j)?.note ? [["note", cell(i, j).note]] : [])],
  });
  const first = rows[0];
  byId("matrix-caption").textContent = `${aboutImages(entry)}Debiased linear CKA of the ${part}s, mean over space (gap) and `
    + `over pairs of sites at matched relative depth; n = ${first.n_images ?? "?"} images; 95 % intervals over `
    + `${first.interval_over ?? "images"}. On the diagonal: two seeds of one architecture, which is the ceiling's measure. `
    + `White crosses: not told from chance (q > ${TOLD_APART}).`;
}
