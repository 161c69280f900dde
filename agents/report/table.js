"use strict";
/* The table of trajectories: filters, sorting, and only those rows in the page that can be seen. */

const ROW = 30;
const COLUMNS = [
  { key: "step", title: "step" }, { key: "level", title: "level" }, { key: "task", title: "task" },
  { key: "reward", title: "reward", down: true }, { key: "calls", title: "calls" }, { key: "length", title: "len" }, { key: "stop", title: "stop" },
];

class Table {
  constructor(table, onPick) {
    this.table = table;
    this.onPick = onPick;
    this.order = [...Array(table.count).keys()];
    this.sorted = { key: null, down: false };
    this.chosen = {};
    this.picked = null;
    this.window = el("div", { class: "window", tabindex: 0, onscroll: () => this.draw(), onkeydown: (e) => this.key(e) });
    this.space = el("div", {});
    this.window.append(this.space);
    this.heads = COLUMNS.map((c) => el("button", { onclick: () => this.sort(c) }, c.title));
    this.counter = el("span", { class: "count" });
    this.filters = this.filterBar();
    this.node = el("div", { class: "card rows" }, el("div", { class: "head" }, this.heads), this.window);
  }

  options(key) {
    const values = [...new Set(this.table[key])];
    return values.every(isNumber) ? values.sort((a, b) => a - b) : values.map(String).sort();
  }

  filterBar() {
    this.selects = {};
    const pick = (key, title, labels) => {
      const values = this.options(key);
      if (values.length < 2) return null;
      const select = el("select", { "data-filter": key, onchange: () => { this.chosen[key] = select.value; this.apply(); } },
        el("option", { value: "" }, "all"), values.map((v) => el("option", { value: v }, visible(labels ? labels[v] ?? v : v))));
      this.selects[key] = select;
      return el("label", {}, title, select);
    };
    this.search = el("input", { type: "search", placeholder: "task id…", size: 14, "aria-label": "search task ids", oninput: () => this.apply() });
    return el("div", { class: "filters" }, pick("correct", "outcome", { 1: "correct", 0: "wrong", "-1": "no verdict" }), pick("level", "level"),
      pick("stop", "stop reason"), pick("step", "step"), pick("split", "split"), this.search,
      el("button", { onclick: () => this.reset() }, "clear"), this.counter);
  }

  reset() {
    for (const key of Object.keys(this.selects)) this.set(key, "");
    this.search.value = "";
    this.apply();
  }

  set(key, value) {
    if (!this.selects[key]) return;
    this.selects[key].value = String(value);
    this.chosen[key] = this.selects[key].value;
  }

  /* From a curve: the trajectories of the step, or of the nearest one that was kept. */
  showStep(step) {
    const steps = this.options("step").filter(isNumber);
    if (!steps.length) return;
    this.set("step", steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a)));
    this.apply();
  }

  sort(column) {
    const same = this.sorted.key === column.key;
    this.sorted = { key: column.key, down: same ? !this.sorted.down : Boolean(column.down) };
    this.apply();
  }

  apply() {
    const t = this.table, wanted = Object.entries(this.chosen).filter(([, v]) => v !== "");
    const needle = this.search.value.trim().toLowerCase();
    this.order = [];
    for (let i = 0; i < t.count; i++) {
      if (wanted.every(([key, v]) => String(t[key][i]) === v) && (!needle || t.task[i].toLowerCase().includes(needle))) this.order.push(i);
    }
    const { key, down } = this.sorted;
    if (key) {
      const list = t[key], sign = down ? -1 : 1;
      const rank = (v) => (v === null || v === undefined ? -Infinity : v);
      this.order.sort((a, b) => (rank(list[a]) < rank(list[b]) ? -sign : rank(list[a]) > rank(list[b]) ? sign : a - b));
    }
    this.heads.forEach((head, i) => {
      const on = COLUMNS[i].key === key;
      head.classList.toggle("on", on);
      head.textContent = COLUMNS[i].title + (on ? (down ? " ↓" : " ↑") : "");
    });
    this.window.scrollTop = 0;
    this.draw();
  }

  draw() {
    const from = Math.max(0, Math.floor(this.window.scrollTop / ROW) - 8);
    const upto = Math.min(this.order.length, from + 40);
    this.space.style.height = `${this.order.length * ROW}px`;
    this.counter.textContent = `${fmt(this.order.length)} of ${fmt(this.table.count)} trajectories`;
    this.space.replaceChildren(...this.order.slice(from, upto).map((i, at) => this.row(i, from + at)));
  }

  row(i, at) {
    const t = this.table, right = t.correct[i] === 1;
    return el("div", { class: `row${i === this.picked ? " on" : ""}`, style: `top:${at * ROW}px`, "data-row": i, onclick: () => this.pick(i) },
      el("span", { class: "dim" }, t.step[i] ?? "–"), el("span", { class: "dim" }, t.level[i]), el("span", { class: "mono", title: visible(t.task[i]) }, visible(t.task[i])),
      el("span", { class: t.correct[i] < 0 ? "dim" : right ? "yes" : "no" }, `${t.correct[i] < 0 ? "?" : right ? "✓" : "✗"} ${fmt(t.reward[i], 2)}`),
      el("span", {}, fmt(t.calls[i])), el("span", {}, fmt(t.length[i])), el("span", {}, badge(t.stop[i], t.stop[i] === "answered" ? "" : "warn")));
  }

  pick(i) {
    this.picked = i;
    this.draw();
    this.onPick(i);
  }

  /* The neighbour in the present order; scrolls it into view. */
  go(by) {
    const at = this.order.indexOf(this.picked), next = this.order[at + by];
    if (next === undefined) return;
    const top = (at + by) * ROW;
    if (top < this.window.scrollTop || top + ROW > this.window.scrollTop + this.window.clientHeight) this.window.scrollTop = top - ROW * 5;
    this.pick(next);
  }

  key(event) {
    const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (by) { event.preventDefault(); this.go(by); }
  }
}
