"use strict";
/* One trajectory: the conversation turn by turn, or the token record as the engine was fed, coloured by a column. */

class Episode {
  constructor(data) {
    this.data = data;
    this.blocks = new Map();
    this.special = new Set(data.special);
    this.column = data.columns.some((c) => c.name === "logp") ? "logp" : (data.columns[0] || { name: "none" }).name;
    this.view = "turns";
    this.node = el("div", { class: "card episode" }, el("p", { class: "dim" }, "Choose a trajectory in the table; the arrow keys go on from there."));
    this.node.addEventListener("pointermove", (event) => this.hover(event));
    this.node.addEventListener("pointerleave", () => tip.hide());
  }

  async detail(i) {
    const b = Math.floor(i / this.data.block_size);
    if (!this.blocks.has(b)) this.blocks.set(b, unpack(`block-${b}`));
    return (await this.blocks.get(b))[i % this.data.block_size];
  }

  async show(i, table) {
    this.index = i;
    this.tableView = table;
    const detail = await this.detail(i);
    if (this.index !== i) return;
    this.detailShown = detail;
    this.node.replaceChildren(...this.parts(i, detail).flat(3).filter(Boolean));
  }

  redraw() {
    if (this.index !== undefined) this.show(this.index, this.tableView);
  }

  parts(i, detail) {
    const t = this.data.table, right = t.correct[i];
    const mates = [];
    for (let j = 0; j < t.count; j++) if (t.unit[j] === t.unit[i]) mates.push(j);
    return [
      el("div", { class: "bar top" }, el("h3", { class: "mono" }, visible(t.task[i])),
        el("div", { class: "bar" }, el("button", { title: "previous (↑)", onclick: () => this.tableView.go(-1) }, "↑"), el("button", { title: "next (↓)", onclick: () => this.tableView.go(1) }, "↓"))),
      el("div", { class: "bar" }, badge(right < 0 ? "no verdict" : right ? "correct" : "wrong", right < 0 ? "warn" : right ? "good" : "bad"),
        badge(`reward ${fmt(t.reward[i])}`, "sea"), badge(`level ${t.level[i]}`), badge(t.stop[i], t.stop[i] === "answered" ? "" : "warn"),
        isNumber(t.step[i]) && badge(`step ${t.step[i]}`), badge(t.split[i]), badge(`${fmt(t.length[i])} sampled tokens`), isNumber(detail.version) && badge(`policy version ${detail.version}`)),
      mates.length > 1 && el("div", { class: "mates" }, `group ${detail.group}:`, mates.map((j) =>
        el("button", { class: `${t.correct[j] === 1 ? "good" : ""} ${j === i ? "on" : ""}`, title: `member ${t.member[j]}, reward ${fmt(t.reward[j])}`, onclick: () => this.tableView.pick(j) }, t.member[j]))),
      detail.segments.length > 0 && this.paintBar(),
      this.view === "tokens" && detail.segments.length ? this.record(detail) : this.turns(detail),
      this.verdict(detail),
    ];
  }

  paintBar() {
    const choice = (name, current, pick, title) => el("button", { class: name === current ? "on" : "", title, onclick: () => { pick(name); this.redraw(); } }, name);
    return el("div", { class: "paint" },
      el("span", { class: "segments" }, choice("turns", this.view, (v) => { this.view = v; }, "the conversation"), choice("tokens", this.view, (v) => { this.view = v; }, "the token record, as the engine was fed")),
      el("span", {}, "colour by"),
      el("span", { class: "segments" }, ["none", ...this.data.columns.map((c) => c.name)].map((name) => choice(name, this.column, (v) => { this.column = v; }))),
      this.legend());
  }

  legend() {
    const spec = this.spec();
    if (!spec) return null;
    const stops = [0, 0.25, 0.5, 0.75, 1].map((s) => this.shade(spec, spec.low + s * (spec.high - spec.low)) || "transparent");
    return el("span", { class: "legend" }, fmt(spec.low, 2), el("i", { style: `background:linear-gradient(to right, ${stops.join(", ")})` }), fmt(spec.high, 2));
  }

  spec() {
    return this.data.columns.find((c) => c.name === this.column);
  }

  /* Diverging columns are clear at 0; the others are clear at the end that is nearer to 0. */
  shade(spec, value) {
    if (!isNumber(value)) return null;
    const far = Math.max(Math.abs(spec.low), Math.abs(spec.high)) || 1;
    if (spec.kind === "diverging") {
      const s = Math.min(1, Math.abs(value) / far);
      return s < 0.01 ? null : `rgb(var(--${value > 0 ? "plus" : "minus"}) / ${(0.1 + 0.5 * s).toFixed(3)})`;
    }
    const near = Math.min(Math.abs(spec.low), Math.abs(spec.high));
    const s = Math.max(0, Math.min(1, (Math.abs(value) - near) / (far - near || 1)));
    return s < 0.01 ? null : `rgb(var(--seq) / ${(0.06 + 0.69 * Math.sqrt(s)).toFixed(3)})`;
  }

  token(segment, s, at) {
    const spec = this.spec(), list = spec && segment.columns[spec.name];
    const text = this.data.tokens[segment.tokens[at]] ?? "�";
    const colour = list && this.shade(spec, list[at]);
    const kind = segment.mask[at] ? "" : "env";
    return el("span", { class: this.special.has(segment.tokens[at]) ? `${kind} special` : kind || null, style: colour && `background:${colour}`, "data-at": `${s}.${at}` },
      visible(text).replace(/\n/g, segment.mask[at] ? "↵\n" : "\n"));
  }

  hover(event) {
    const at = event.target.dataset && event.target.dataset.at;
    if (!at || !this.detailShown) { if (!event.target.closest(".chart")) tip.hide(); return; }
    const [s, n] = at.split(".").map(Number), segment = this.detailShown.segments[s];
    const lines = [["token", JSON.stringify(this.data.tokens[segment.tokens[n]])], ["id", fmt(this.data.ids[segment.tokens[n]])], ["position", fmt(n)], ["turn", fmt(segment.turn[n])], ["sampled", fmt(Boolean(segment.mask[n]))]];
    for (const { name } of this.data.columns) {
      const value = segment.columns[name] && segment.columns[name][n];
      if (isNumber(value)) lines.push([name, fmt(value, 4)]);
      if (name === "logp" && isNumber(value)) lines.push(["probability", fmt(Math.exp(value), 4)]);
    }
    tip.show(event, lines);
  }

  record(detail) {
    return detail.segments.map((segment, s) => [
      detail.segments.length > 1 && el("p", { class: "note" }, `segment ${s}${isNumber(segment.parent) ? `, continues segment ${segment.parent} with rewritten history` : ""}`),
      el("div", { class: "tokens" }, segment.tokens.map((_, at) => this.token(segment, s, at))),
      segment.cut > 0 && el("p", { class: "note" }, `… ${fmt(segment.cut)} more tokens are not kept in this report`),
    ]);
  }

  turns(detail) {
    let turn = -1;
    return detail.messages.map((m) => {
      if (m.turn !== undefined) turn = m.turn;
      return el("div", { class: `message ${/^[a-z]+$/.test(m.role) ? m.role : ""}` },
        el("div", { class: "who" }, visible(m.role), m.name && el("small", {}, visible(m.name)), m.turn !== undefined && el("small", {}, `turn ${m.turn + 1}`)),
        el("div", {}, this.body(detail, m), m.calls && m.calls.length > 0 && el("div", { class: "calls" }, m.calls.map((c) =>
          el("span", { class: `call${c.error ? " failed" : ""}`, title: c.error || "" }, `${visible(c.text)}${c.error ? ` · ${visible(c.error)}` : ""}`)))));
    });
  }

  body(detail, m) {
    const spans = m.turn === undefined || !this.data.named ? [] : detail.segments.flatMap((segment, s) =>
      segment.tokens.map((_, at) => at).filter((at) => segment.mask[at] && segment.turn[at] === m.turn).map((at) => this.token(segment, s, at)));
    if (spans.length) return el("div", { class: "body tokens" }, spans);
    const more = [[m.cut, "characters"], [m.parts_cut, "parts"]].map(([n, what]) => n > 0 && el("span", { class: "note" }, ` … ${fmt(n)} more ${what} are not kept in this report`));
    const content = m.parts ? m.parts.map((part) => this.part(part)) : visible(m.text);
    if (m.role === "system" && m.text.length > 700) return el("div", { class: "body" }, el("details", {}, el("summary", {}, `${fmt(m.text.length)} characters`), content, more));
    return el("div", { class: "body" }, m.text === "" ? el("span", { class: "dim" }, "(empty)") : content, more);
  }

  /* A text, or an image: from the file itself, or its size where it is not kept. */
  part(part) {
    if (typeof part === "string") return visible(part);
    const size = `${fmt(part.width)} × ${fmt(part.height)} pixels`;
    if (!isNumber(part.image)) return el("span", { class: "note" }, ` [image of ${size}, not kept in this report] `);
    const data = byId(`image-${part.image}`);
    return el("img", { src: `data:${data.dataset.kind};base64,${data.textContent}`, alt: `image of ${size}`, title: size });
  }

  verdict(detail) {
    return el("div", { class: "verdict" }, el("b", {}, "verdict"), " ", detail.failure && badge(detail.failure, "bad"),
      pairs([...detail.scores, ...detail.facts]));
  }
}
