// What was run, and the start of everything.
"use strict";

const SECTIONS = { planes: "plane, depth, ruler", stitching: "stitching", legacy: "earlier recipe",
  explanations: "explanations", steps: "processing steps", matrices: "architectures" };

function runCard(run) {
  const images = run.data.map(([split, count, hash]) =>
    `${split}: ${[there(count) ? `${count} images` : null, hash ? `hash ${hash}` : null].filter(there).join(", ")}`);
  const kind = { true: "synthetic images", false: "real images" }[String(run.synthetic)] ?? "the settings do not say which images";
  const facts = [["commit", run.commit], ["last begun or continued", run.time && `${run.time.slice(0, 16).replace("T", " ")} UTC`], ["device", run.device],
    ["shown above", run.sections.map((name) => SECTIONS[name]).join(", ") || "nothing; its tables are in its folder"]];
  const versions = Object.entries(run.packages).map(([name, version]) => `${name} ${version}`).join(", ");
  return element("article", { class: "run" }, element("h3", {}, run.folder),
    element("p", {}, element("span", { class: run.synthetic ? "synthetic" : "" }, kind)),
    element("ul", {}, facts.filter(([, value]) => there(value)).map(([name, value]) => element("li", {}, `${name}: ${value}`)),
      images.map((line) => element("li", {}, line))),
    run.problems.length ? element("div", { class: "missing" }, "Not all of it could be used: ", run.problems.join(" ")) : null,
    run.settings.length ? element("details", {}, element("summary", {}, "Settings and versions"),
      element("p", {}, versions ? `${versions}.` : "Versions were not kept."),
      tableOf(run.settings, [["setting", ([key]) => key], ["value", ([, value]) => value]], `Settings of ${run.folder}`)) : null);
}

fill(byId("runs-list"), DATA.runs.length ? DATA.runs.map(runCard) : missing("No results folder was found."));
byId("stamp").textContent = `Page built ${DATA.page.built} by python experiments.py report, commit ${DATA.page.commit}. `
  + "Nothing on it is fetched from anywhere.";
showComparison();
document.documentElement.dataset.ready = "";
