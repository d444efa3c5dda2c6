// Both sites of an opened cell: where they are, of what axes and shape, how deep, and what they see of the same images.
"use strict";

const FACTS = [["path", "site"], ["part", "part"], ["axes", "axes"], ["shape, without the batch", "shape"],
  ["relative depth in its part", "depth"], ["parameters of the module", "parameters"],
  ["pixels between tokens", "strides"]];
let back = null; // the map to return to

function openDetails(entry, row, from) {
  if (!row) return;
  back = from;
  const sides = ["a", "b"].map((side, place) => ({
    name: entry.names[place], model: entry.models[place], part: row[`part_${side}`], site: row[`site_${side}`],
  }));
  byId("details-title").textContent = `${sides[0].name} × ${sides[1].name}`;
  const numbers = [...factsOf(row), ["p as the best of its row", number(row.p_best)], ["p, exact", number(row.p_exact)]];
  fill(byId("details-body"),
    element("p", {}, `${chosen.estimator}, ${inPolicyWords(chosen.policy)}, n = ${row.n_images} images.`),
    element("table", {}, element("tbody", {}, numbers.map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))))),
    element("h4", {}, "The two sites"), sitesTable(entry, sides), ...picturesOf(entry, sides),
    element("p", {}, element("button", { type: "button", onclick: () => back.focus() }, "Back to the map (Esc)")));
  byId("details-title").focus();
}

function closeDetails() {
  byId("details-title").textContent = "A pair of sites";
  fill(byId("details-body"), element("p", {}, "Click a cell, or move with the arrow keys and press Enter: both sites' "
    + "facts and what they see appear here."));
}

byId("details").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && back) back.focus();
});

/** A path that may be broken after its dots. */
const breakable = (text) => text.replaceAll(".", ".\u200b");

function sitesTable(entry, sides) {
  const facts = sides.map((side) => ({ part: side.part, site: side.site,
    ...entry.sites.find((row) => row.site === side.site && row.model === side.model) }));
  const rows = FACTS.filter(([, key]) => facts.some((fact) => there(fact[key])));
  const head = element("tr", {}, element("th", {}, ""), sides.map((side) => element("th", { scope: "col" }, side.name)));
  const body = rows.map(([words, key]) => element("tr", {}, element("th", { scope: "row" }, words),
    facts.map((fact) => element("td", {}, key === "parameters" && there(fact[key])
      ? fact[key].toLocaleString("en") : key === "site" ? breakable(fact[key]) : number(fact[key])))));
  const table = element("table", { class: "sites" }, element("thead", {}, head), element("tbody", {}, body));
  return entry.sites.length ? table : [table, element("p", { class: "caption" },
    "Axes, shape and depth are shown where the run has a sites.csv.")];
}

// ------------------------------------------------------------------------------------------------------- pictures

/** The two sites' maps beside the images they saw, or the reason why there are none. */
function picturesOf(entry, sides) {
  const title = element("h4", {}, "What they see");
  if (!entry.pictures) {
    const why = entry.synthetic ? "This run wrote no pictures." : "Pictures over real images are not shared: the images are "
      + "not ours to publish.";
    return [title, element("p", {}, why)];
  }
  const { pictures } = entry;
  const rows = sides.map((side) => pictures.sites.find((each) => each.site === side.site && each.model === side.model));
  const held = (row) => (row ? ` (${Math.round(100 * row.share)} %)` : "");
  const head = element("tr", {}, element("th", { scope: "col" }, "image"),
    sides.map((side, k) => element("th", { scope: "col" }, side.name + held(rows[k]))));
  const atlas = new Image();
  const tiles = [];
  const tile = (row, column, words) => {
    if (row === undefined) return element("span", {}, "no map in the image's plane");
    const canvas = element("canvas", { class: "tile", role: "img", "aria-label": words, width: pictures.tile,
      height: pictures.tile });
    tiles.push([canvas, row, column]);
    return canvas;
  };
  const body = pictures.images.map((id, column) => element("tr", {},
    element("td", {}, tile(0, column, `synthetic image ${id}`)),
    rows.map((row, k) => element("td", {}, tile(row && row.row, column, `${sides[k].name}, ${sides[k].site}, ${id}`)))));
  atlas.addEventListener("load", () => {
    for (const [canvas, row, column] of tiles) {
      canvas.getContext("2d", { willReadFrequently: true }).drawImage(atlas, column * pictures.tile, row * pictures.tile, pictures.tile, pictures.tile,
        0, 0, pictures.tile, pictures.tile);
    }
  });
  atlas.src = pictures.address;
  return [title, element("table", { class: "pictures" }, element("thead", {}, head), element("tbody", {}, body)),
    element("p", { class: "caption" }, `Synthetic images; networks of seed ${pictures.seed}. The first three principal `
      + "components of each site over all pixels of these images (their share of its variance in brackets), rotated onto "
      + "those of the images themselves, as red, green and blue: colours compare as far as both sites follow the images.")];
}
