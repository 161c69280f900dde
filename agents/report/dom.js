"use strict";
/* Building blocks of the report. Text reaches the page as text nodes only: nothing here parses markup. */

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/* Three significant digits, thin spaces between thousands, a dash for what is missing. */
function fmt(value, digits = 3) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace("e+", "e");
  if (Number.isInteger(value)) return size < 1e4 ? String(value) : value.toLocaleString("en").replace(/,/g, "\u2009");
  return String(Number(value.toPrecision(digits)));
}

const percent = (share) => (isNumber(share) ? `${(100 * share).toFixed(1)} %` : "–");

/* Control, bidirectional and unpaired surrogate characters made visible, so that text can neither hide nor reorder. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function visible(text) {
  return String(text).replace(HIDDEN, (c) => {
    const code = c.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

/* The packed parts of the page: gzip, then base64, so that no text of a run is ever markup of the report. */
async function unpack(id) {
  const packed = byId(id).textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/* One tooltip for the whole page. */
const tip = {
  node: null,
  show(event, lines) {
    if (!this.node) document.body.append((this.node = el("div", { id: "tip", role: "tooltip" })));
    this.node.replaceChildren(...lines.map(([name, value, swatch]) =>
      el("div", {}, swatch && el("i", { class: `swatch ${swatch}` }), el("span", {}, name), el("b", {}, value))));
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
    const top = Math.min(event.clientY + 14, innerHeight - box.height - 6);
    this.node.style.left = `${Math.max(4, left)}px`;
    this.node.style.top = `${Math.max(4, top)}px`;
  },
  hide() {
    if (this.node) this.node.hidden = true;
  },
};

function badge(text, kind) {
  return el("span", { class: `badge ${kind || ""}` }, visible(text));
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}
