// Ground floor of the page: elements, numbers in words, switches, and plots that follow width, theme and printer.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const NONE = "–";
const PRINTED_WIDTH = 660; // px: what an A4 page holds
const NARROW = 600; // px: below it, axes are numbered instead of named

const byId = (id) => document.getElementById(id);

/** An element with attributes ("on…" are listeners) and children; strings become text, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function fill(host, ...children) {
  host.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** A packed table as a list of rows. */
function unpack(table) {
  const names = Object.keys(table.columns);
  const columns = names.map((name) => unpackColumn(table.columns[name]));
  return Array.from({ length: table.rows }, (_, row) =>
    Object.fromEntries(names.map((name, place) => [name, columns[place][row]])));
}

function unpackColumn(column) {
  if (Array.isArray(column)) return column;
  return column.codes.map((code) => (code < 0 ? null : column.levels[code]));
}

const unique = (values) => [...new Set(values)];
const there = (value) => value !== null && value !== undefined;

/** Three significant digits; a dash where there is no number. */
function number(value) {
  if (typeof value === "string") return value;
  if (!there(value)) return NONE;
  if (value !== 0 && Math.abs(value) < 0.0005) return value.toExponential(1);
  return Math.abs(value) >= 1000 ? value.toLocaleString("en") : String(Number(value.toPrecision(3)));
}

function withInterval(row, name) {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  return number(row[name]) + (there(low) && there(high) ? ` (${number(low)} … ${number(high)})` : "");
}

/** Text for plotly, which reads a few tags and braces in what it shows. */
function safe(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// ------------------------------------------------------------------------------------------------------- switches

/** A select with a label; `options` are [value, words]. */
function select(words, options, value, change) {
  const list = element("select", { onchange: (event) => change(event.target.value), "aria-label": words },
    options.map(([key, text]) => element("option", { value: key }, text)));
  list.value = value;
  return element("label", { class: "select" }, words, list);
}

/** Buttons of which one is pressed; `options` are [value, words]. */
function radios(words, name, options, value, change) {
  const buttons = options.map(([key, text]) => {
    const button = element("input", { type: "radio", name, value: key, onchange: () => change(key) });
    button.checked = key === value;
    return element("label", {}, button, element("span", {}, text));
  });
  return element("fieldset", {}, element("legend", {}, words), buttons);
}

/** Put switches in their place, and keep the keyboard where it was. */
function place(host, ...switches) {
  const active = document.activeElement;
  const held = host.contains(active) ? [active.getAttribute("aria-label"), active.name, active.value] : null;
  fill(host, ...switches);
  if (!held) return;
  const again = [...host.querySelectorAll("select, input")].find((each) =>
    held[0] ? each.getAttribute("aria-label") === held[0] : each.name === held[1] && each.value === held[2]);
  if (again) again.focus();
}

function missing(words, command) {
  return element("p", { class: "missing" }, `${words} `, command ? element("code", {}, command) : null);
}

/** A table of rows: columns are [heading, row => cell]; wide ones scroll in their own box. */
function tableOf(rows, columns, label) {
  const head = element("tr", {}, columns.map(([heading]) => element("th", { scope: "col" }, heading)));
  const body = rows.map((row) => element("tr", {}, columns.map(([, cell]) => element("td", {}, cell(row)))));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, body));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

function aboutImages(entry) {
  if (entry.synthetic === true) return "Synthetic images. ";
  return entry.synthetic === false ? "Real images. " : "";
}

// ---------------------------------------------------------------------------------------------------------- plots

const plots = new Map(); // host -> how to draw it at a width in a theme

function theme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "ink", "quiet", "line", "none", "blue", "orange", "green", "band", "floor"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Draw `make(width, colours) -> {data, layout}` into a host, and again when the page changes. */
function plot(host, make) {
  plots.set(host, make);
  draw(host);
}

function unplot(host) {
  if (plots.delete(host)) Plotly.purge(host);
}

function draw(host) {
  const printing = "printing" in document.documentElement.dataset;
  const width = printing ? PRINTED_WIDTH : Math.floor(host.getBoundingClientRect().width);
  if (!width) return;
  const colours = theme();
  const { data, layout } = plots.get(host)(width, colours);
  const axis = { gridcolor: colours.line, zerolinecolor: colours.line, linecolor: colours.line, fixedrange: true };
  const whole = {
    width, dragmode: false, paper_bgcolor: colours.paper, plot_bgcolor: colours.paper,
    font: { color: colours.ink, size: 12 }, margin: { l: 60, r: 16, t: 16, b: 50 },
    hoverlabel: { bgcolor: colours.paper, bordercolor: colours.ink, font: { color: colours.ink }, align: "left" },
    ...layout,
  };
  for (const key of Object.keys(whole)) if (/^[xy]axis\d*$/.test(key)) whole[key] = { ...axis, ...whole[key] };
  Plotly.react(host, data, whole, { displayModeBar: false, responsive: false, doubleClick: false });
}

function redraw() {
  for (const host of plots.keys()) draw(host);
}

let waiting = null;
window.addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(redraw);
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("beforeprint", () => {
  document.documentElement.dataset.printing = "";
  redraw();
});
window.addEventListener("afterprint", () => {
  delete document.documentElement.dataset.printing;
  redraw();
});
