"use strict";

function curves(data, onStep) {
  const { steps, columns } = data.metrics;
  if (!steps.length) return null;
  const crosshair = new Crosshair(onStep);
  const marks = data.evals.filter((e) => isNumber(e.step) && e.main).map((e) => ({ step: e.step, label: e.label, mean: e.success[0], low: e.success[1], high: e.success[2] }));
  const specs = CURVES.map((c) => (c.key === "correct" ? { ...c, marks } : c)).filter((c) => (columns[c.key] || []).some(isNumber));
  return el("div", { class: "charts" }, specs.map((c) => chart(c, steps, columns[c.key], crosshair)));
}

function section(title, note, ...content) {
  const inner = content.flat(3).filter(Boolean);
  return inner.length ? [el("h2", {}, title, note && el("small", {}, note)), ...inner] : [];
}

async function start() {
  const data = await unpack("summary");
  const episode = new Episode(data);
  const table = new Table(data.table, (i) => episode.show(i, table));
  const browse = data.table.count > 0 && [table.filters, el("div", { class: "browser" }, table.node, episode.node)];
  const toStep = (step) => { table.showStep(step); if (browse) table.filters.scrollIntoView({ behavior: "smooth" }); };
  byId("report").replaceChildren(
    headline(data),
    ...section("Doctor", "", doctor(data.findings)),
    ...section("Curves", "hover for values; click for the trajectories of a step", curves(data, toStep)),
    ...section("Evaluations", "95 % intervals; same tasks before and after", data.evals.length > 0 && evaluations(data.evals)),
    ...section("Trajectories", data.table.note, browse),
    ...section("Configuration", "", config(data)));
  window.report = { data, table, episode }; /* for the console */
  table.apply();
  if (data.table.count) table.pick(table.order[0]);
  document.documentElement.dataset.ready = "yes";
}

byId("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(dark ? "light" : "dark");
});

start().catch((error) => {
  byId("report").replaceChildren(el("p", { class: "problem" }, `This report cannot be shown: ${error.message}`));
  throw error;
});
