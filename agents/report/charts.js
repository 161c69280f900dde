"use strict";
/* Curves as inline SVG: the steps as they came, a running mean over them, and one crosshair through all charts. */

const WIDE = 340, HIGH = 150, LEFT = 42, RIGHT = 10, TOP = 10, BOTTOM = 20;

function niceTicks(low, high, count) {
  const span = high - low || 1;
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= count) || 10 * power;
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return ticks;
}

/* Powers of ten, with 2 and 5 times them where few fit. */
function logTicks(low, high) {
  const powers = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) powers.push(10 ** p);
  const fine = powers.flatMap((p) => [p, 2 * p, 5 * p]).filter((t) => t >= low && t <= high);
  return fine.length <= 5 ? fine : powers.filter((t) => t >= low).filter((_, i, all) => i % Math.ceil(all.length / 5) === 0);
}

/* Exponential running mean that starts without bias; gaps stay gaps. */
function smooth(values) {
  const keep = values.length > 20 ? 0.85 : 0.6;
  let mean = 0, weight = 0;
  return values.map((v) => {
    if (!isNumber(v)) return null;
    mean = keep * mean + (1 - keep) * v;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

function path(points) {
  let out = "", pen = false;
  for (const [x, y] of points) {
    if (!isNumber(y)) { pen = false; continue; }
    out += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = true;
  }
  return out;
}

function range(values, spec) {
  const finite = values.filter(isNumber).sort((a, b) => a - b);
  if (!finite.length) return [0, 1];
  let low = finite[0], high = finite[finite.length - 1];
  if (spec.unit) return [0, 1];
  if (spec.log) return [Math.max(low, high / 1e8, 1e-12), Math.max(high, 1e-12) * 1.5];
  const q = finite[Math.floor(0.98 * (finite.length - 1))];
  if (finite.length > 20 && high - low > 8 * (q - low) && q > low) high = q * 1.5;
  if (spec.zero !== false && low > 0) low = 0;
  const margin = 0.06 * (high - low || Math.abs(high) || 1);
  return [low < 0 ? low - margin : low, high + margin];
}

/* spec: {key, title, hint, unit: values in [0,1], log, guide: a horizontal line, marks: [{step, mean, low, high, label}]} */
function chart(spec, steps, values, crosshair) {
  const marks = spec.marks || [];
  const x0 = Math.min(...steps, ...marks.map((m) => m.step)), x1 = Math.max(...steps, ...marks.map((m) => m.step));
  const [low, high] = range(values.concat(marks.flatMap((m) => [m.low, m.high])), spec);
  const scale = (v) => (spec.log ? Math.log10(Math.max(v, 1e-12)) : v);
  const px = (s) => LEFT + ((s - x0) / (x1 - x0 || 1)) * (WIDE - LEFT - RIGHT);
  const py = (v) => {
    const share = (scale(v) - scale(low)) / (scale(high) - scale(low) || 1);
    return HIGH - BOTTOM - Math.max(-0.02, Math.min(1.03, share)) * (HIGH - TOP - BOTTOM);
  };
  const at = (list) => steps.map((s, i) => [px(s), isNumber(list[i]) ? py(list[i]) : null]);
  const mean = smooth(values);
  const yTicks = spec.log
    ? logTicks(low, high)
    : niceTicks(low, high, 4);
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden" });
  const dot = svg("circle", { class: "dot", r: 3.2, visibility: "hidden" });
  const last = [...mean].reverse().find(isNumber);
  const readout = el("span", { class: "readout" }, fmt(last));
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": spec.title },
    yTicks.map((t) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: py(t), y2: py(t) }),
      svg("text", { class: "tick", x: LEFT - 6, y: py(t) + 3.5, "text-anchor": "end" }, fmt(t, 2)),
    ]),
    niceTicks(x0, x1, 5).filter(Number.isInteger).map((t) =>
      svg("text", { class: "tick", x: px(t), y: HIGH - 5, "text-anchor": "middle" }, fmt(t))),
    isNumber(spec.guide) && spec.guide > low && spec.guide < high &&
      svg("line", { class: "guide", x1: LEFT, x2: WIDE - RIGHT, y1: py(spec.guide), y2: py(spec.guide) }),
    svg("path", { class: "raw", d: path(at(values)) }),
    svg("path", { class: "mean", d: path(at(mean)) }),
    steps.length === 1 && isNumber(values[0]) && svg("circle", { class: "dot", r: 3.2, cx: px(steps[0]), cy: py(values[0]) }),
    marks.map((m) => svg("g", { class: "mark" },
      svg("line", { x1: px(m.step), x2: px(m.step), y1: py(m.low), y2: py(m.high) }),
      svg("circle", { cx: px(m.step), cy: py(m.mean), r: 3.6 }))),
    cursor, dot);
  crosshair.add({
    drawing, steps, px,
    move(i) {
      for (const [name, value] of [["x1", px(steps[i])], ["x2", px(steps[i])]]) cursor.setAttribute(name, value);
      cursor.setAttribute("visibility", "visible");
      const shown = isNumber(values[i]);
      dot.setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) { dot.setAttribute("cx", px(steps[i])); dot.setAttribute("cy", py(values[i])); }
      readout.textContent = fmt(values[i]);
      readout.classList.add("live");
    },
    leave() {
      cursor.setAttribute("visibility", "hidden");
      dot.setAttribute("visibility", "hidden");
      readout.textContent = fmt(last);
      readout.classList.remove("live");
    },
    tips(i) {
      const near = marks.filter((m) => m.step === steps[i]).map((m) => [m.label, `${fmt(m.mean)} [${fmt(m.low)}, ${fmt(m.high)}]`]);
      return [["step", fmt(steps[i])], [spec.title, fmt(values[i])], ["running mean", fmt(mean[i])], ...near];
    },
  });
  return el("figure", { class: "chart", "data-metric": spec.key },
    el("figcaption", {}, el("span", { title: spec.hint }, spec.title), readout), drawing);
}

/* All charts follow the pointer over one of them; a click hands the step on. */
class Crosshair {
  constructor(onStep) {
    this.members = [];
    this.onStep = onStep;
  }

  add(member) {
    this.members.push(member);
    const nearest = (event) => {
      const box = member.drawing.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDE;
      let best = 0;
      member.steps.forEach((s, i) => { if (Math.abs(member.px(s) - x) < Math.abs(member.px(member.steps[best]) - x)) best = i; });
      return best;
    };
    member.drawing.addEventListener("pointermove", (event) => {
      const i = nearest(event);
      this.members.forEach((m) => m.move(i));
      tip.show(event, member.tips(i));
    });
    member.drawing.addEventListener("pointerleave", () => { this.members.forEach((m) => m.leave()); tip.hide(); });
    member.drawing.addEventListener("click", (event) => this.onStep(member.steps[nearest(event)]));
  }
}

const CURVES = [
  { key: "correct", title: "success", unit: true, hint: "share of training episodes judged correct; dots: evaluations with 95 % intervals" },
  { key: "reward", title: "reward", hint: "mean reward of the episodes of a step" },
  { key: "tool_calls", title: "tool calls", hint: "tool calls per episode" },
  { key: "length", title: "length", hint: "generated tokens per episode" },
  { key: "entropy", title: "entropy", hint: "nats per sampled token" },
  { key: "kl", title: "KL per step", zero: false, hint: "KL(old || new) per sampled token, k3 estimate" },
  { key: "kl_ref", title: "KL to reference", zero: false, hint: "KL to the reference model per sampled token" },
  { key: "clip_frac", title: "clip share", hint: "share of tokens or rows whose ratio was clipped" },
  { key: "grad_norm", title: "gradient norm", hint: "before clipping" },
  { key: "logp_gap", title: "log-prob gap", log: true, guide: 1e-4, hint: "max |log p trainer − log p sampler|; the alarm for weight sync" },
  { key: "zero_variance_groups", title: "zero-variance groups", unit: true, hint: "share of groups whose rewards are all equal" },
  { key: "truncated", title: "truncated", hint: "share of episodes cut by a limit" },
  { key: "loss", title: "loss", zero: false, hint: "value of the surrogate; no measure of progress" },
  { key: "lr", title: "learning rate", hint: "" },
  { key: "tokens_per_second", title: "tokens/s", hint: "sampled tokens per second of rollout" },
];
