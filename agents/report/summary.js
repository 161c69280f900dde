"use strict";
/* The top of the page: headline numbers, the doctor, evaluations with their intervals, the configuration. */

const fixed = (value) => (isNumber(value) ? value.toFixed(3) : "–");
const decimals = (value) => (isNumber(value) ? value.toFixed(2) : "–");
const pair = (evals, label) => evals.find((e) => e.label === label);

function headline(data) {
  const before = pair(data.evals, "before"), after = pair(data.evals, "after");
  const shown = after || before || data.evals[data.evals.length - 1];
  const cards = [];
  if (shown) {
    const interval = (e) => `[${fixed(e.success[1])}, ${fixed(e.success[2])}]`;
    const gain = data.gain && `paired gain ${fixed(data.gain[0])} [${fixed(data.gain[1])}, ${fixed(data.gain[2])}]`;
    cards.push(el("div", { class: "card" }, el("div", { class: "label" }, "success on held-out tasks"),
      el("div", { class: "big" },
        before && after && [el("span", { class: "from" }, percent(before.success[0])), el("span", { class: "arrow" }, "→")],
        percent(shown.success[0])),
      el("div", { class: "note" }, before && after
        ? `95 % intervals ${interval(before)} and ${interval(after)}${gain ? `; ${gain}` : ""}`
        : `${shown.label}, 95 % interval ${interval(shown)}`)));
    cards.push(number("tool calls per episode", decimals(shown.tool_calls[0]),
      before && after ? `before: ${decimals(before.tool_calls[0])}` : ""));
  }
  const m = data.metrics, last = (key) => (m.columns[key] || []).filter(isNumber).pop();
  if (m.steps.length) cards.push(number("steps", fmt(m.steps.length), isNumber(last("seconds")) ? `${fmt(last("seconds"))} s the last` : ""));
  cards.push(number("episodes kept", fmt(data.table.count),
    data.table.total > data.table.count ? `shown: ${fmt(data.table.count)} of ${fmt(data.table.total)}` : "all shown below"));
  return el("section", { class: "headline" }, cards);
}

function number(label, value, note) {
  return el("div", { class: "card" }, el("div", { class: "label" }, label), el("div", { class: "big" }, value), el("div", { class: "note" }, note || "\u00a0"));
}

function doctor(findings) {
  const loud = findings.filter((f) => f.level !== "ok"), quiet = findings.filter((f) => f.level === "ok");
  return [
    el("div", { class: "findings" }, loud.map((f) =>
      el("div", { class: `card finding ${f.level}`, "data-finding": f.name },
        el("b", {}, f.name.replace(/_/g, " ")), el("span", { class: `badge ${f.level}` }, `${fmt(f.value)}, bound ${fmt(f.threshold)}`),
        el("div", { class: "note" }, f.seen), el("p", {}, f.advice)))),
    quiet.length > 0 && el("p", { class: "well" }, el("b", {}, "Within bounds: "),
      quiet.map((f) => `${f.name.replace(/_/g, " ")} ${fmt(f.value)}`).join(" · ")),
  ];
}

function whisker([mean, low, high]) {
  const x = (v) => 6 + 208 * Math.max(0, Math.min(1, v));
  return svg("svg", { class: "whisker", viewBox: "0 0 220 18", role: "img", "aria-label": `${fmt(mean)} [${fmt(low)}, ${fmt(high)}]` },
    svg("line", { class: "axis", x1: 6, x2: 214, y1: 9, y2: 9 }),
    [0, 0.5, 1].map((t) => svg("line", { class: "axis", x1: x(t), x2: x(t), y1: 5, y2: 13 })),
    svg("line", { class: "ends", x1: x(low), x2: x(high), y1: 9, y2: 9 }),
    svg("circle", { cx: x(mean), cy: 9, r: 4 }));
}

function evaluations(evals) {
  const ks = [...new Set(evals.flatMap((e) => Object.keys(e.pass_at || {})))].filter((k) => k !== "1").sort((a, b) => a - b);
  const both = ([mean, low, high]) => [el("b", {}, fixed(mean)), ` [${fixed(low)}, ${fixed(high)}]`];
  const rows = evals.flatMap((e) => [
    el("tr", {}, el("td", { class: "name" }, visible(e.label), el("span", { class: "note" }, visible(e.about || ""))),
      el("td", {}, whisker(e.success)), el("td", { class: "num" }, both(e.success)),
      ks.map((k) => el("td", { class: "num" }, e.pass_at && e.pass_at[k] ? both(e.pass_at[k]) : "–")),
      el("td", { class: "num" }, decimals(e.tool_calls[0])), el("td", { class: "num" }, fixed(e.productivity)),
      el("td", { class: "num" }, fmt(e.episodes)),
      el("td", { class: "num" }, e.failure_share > 0 ? badge(percent(e.failure_share), e.marked ? "bad" : "warn") : "0")),
    ...(e.levels.length > 1 ? e.levels : []).map((l) =>
      el("tr", { class: "sub" }, el("td", {}, `level ${visible(l.level)}`), el("td", {}, whisker(l.success)),
        el("td", { class: "num" }, both(l.success)), ks.map(() => el("td", {})), el("td", { class: "num" }, decimals(l.tool_calls)),
        el("td", { class: "num" }, fixed(l.productivity)), el("td", { class: "num" }, fmt(l.episodes)), el("td", {}))),
  ]);
  return el("div", { class: "card scroll" }, el("table", { class: "evals" },
    el("thead", {}, el("tr", {}, el("th", {}, "evaluation"), el("th", {}, "0 ··· success ··· 1"), el("th", { class: "num" }, "success [95 %]"),
      ks.map((k) => el("th", { class: "num" }, `pass@${k}`)), el("th", { class: "num" }, "calls / episode"),
      el("th", { class: "num", title: "correct answers per tool call" }, "productivity"), el("th", { class: "num" }, "episodes"), el("th", { class: "num" }, "failures"))),
    el("tbody", {}, rows)));
}

function pairs(entries) {
  return el("dl", { class: "pairs" }, entries.map(([name, value]) => [el("dt", {}, visible(name)), el("dd", { class: "mono" }, visible(value))]));
}

function config(data) {
  if (!data.config.length) return null;
  return el("details", { class: "card config" }, el("summary", {}, `${data.config.length} options as resolved`), pairs(data.config));
}
