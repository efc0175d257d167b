"use strict";
// How often each expert of each layer was used, as a map, as a sentence on the cell looked at, and as a table.

import { element, table } from "./dom.js";

const WIDE_TABLE = 32;
const NAMED = 8;

// Counts of one conversation. Rows are layers, shares are over the fair share: 1.00 is fair, 0 is idle.
export class Counts {
  layers = []; rows = []; tokens = 0;

  learn(layers) {
    if (this.layers.length) return;
    this.layers = layers;
    this.rows = layers.map(() => []);
  }

  add(tokens) {
    for (const { experts } of tokens) {
      this.tokens += 1;
      experts.forEach((chosen, layer) => {
        const row = this.rows[layer];
        for (const expert of chosen) if (expert >= 0) row[expert] = (row[expert] ?? 0) + 1;
      });
    }
  }

  get wide() { return Math.max(0, ...this.rows.map((row) => row.length)); }

  shares(wide = this.wide) {
    return this.rows.map((row) => {
      const fair = row.reduce((sum, value) => sum + (value ?? 0), 0) / wide;
      return Array.from({ length: wide }, (_, expert) => (fair ? (row[expert] ?? 0) / fair : 0));
    });
  }
}

function shade(value, middle) {
  const strength = Math.min(Math.abs(value - middle), 1) * 75;
  return `hsl(${value > middle ? 8 : 215} ${strength}% ${value > middle ? 55 : 50}%)`;
}

// A map in `into`. `middle` is the value in grey: 1 for shares, 0 for their differences.
export class Heat {
  #shown = { layers: [], values: [] }; #cell = [0, 0]; #middle; #canvas; #box; #said; #note; #more; #name;

  constructor(into, name, middle = 1) {
    this.#middle = middle;
    this.#name = name;
    this.#canvas = element("canvas", { width: 320, height: 10, role: "img", ariaLabel: name });
    this.#box = element("div", { className: "heat-map", tabIndex: 0, role: "group", ariaLabel: `${name}; arrow keys walk`, hidden: true }, this.#canvas);
    this.#said = element("output");
    this.#note = element("p", { className: "note" }, "Each row is a layer, each column an expert.");
    this.#more = element("details", { hidden: true }, element("summary", {}, "As a table"));
    into.replaceChildren(this.#note, this.#box, this.#said, this.#more);
    this.#box.addEventListener("pointermove", (event) => this.#point(event));
    this.#box.addEventListener("keydown", (event) => this.#walk(event));
    this.#box.addEventListener("focus", () => this.#tell());
    this.#more.addEventListener("toggle", () => this.#tabulate());
  }

  show(layers, values, note) {
    this.#shown = { layers, values };
    const wide = values[0]?.length ?? 0;
    for (const part of [this.#box, this.#more]) part.hidden = !wide;
    this.#note.textContent = wide ? note : "Each row is a layer, each column an expert.";
    if (!wide) {
      this.#said.textContent = "";
      return;
    }
    this.#draw(wide);
    this.#tabulate();
  }

  #draw(wide) {
    const { values } = this.#shown;
    const high = Math.max(8, Math.min(24, Math.floor(320 / values.length)));
    this.#canvas.width = Math.max(wide, 320);
    this.#canvas.height = high * values.length;
    this.#canvas.style.height = `${this.#canvas.height}px`;
    const paint = this.#canvas.getContext("2d");
    values.forEach((row, layer) => row.forEach((value, expert) => {
      paint.fillStyle = shade(value, this.#middle);
      const left = Math.floor((expert * this.#canvas.width) / wide);
      paint.fillRect(left, layer * high, Math.ceil(this.#canvas.width / wide), high - 1);
    }));
  }

  #point(event) {
    const { values } = this.#shown;
    const box = this.#canvas.getBoundingClientRect();
    const place = (at, from, size, count) => Math.min(count - 1, Math.max(0, Math.floor(((at - from) / size) * count)));
    this.#cell = [
      place(event.clientY, box.top, box.height, values.length),
      place(event.clientX, box.left, box.width, values[0].length),
    ];
    this.#tell();
  }

  #walk(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { values } = this.#shown;
    const most = [values.length - 1, values[0].length - 1];
    this.#cell = this.#cell.map((at, axis) => Math.min(most[axis], Math.max(0, at + step[axis])));
    this.#tell();
  }

  #tell() {
    const [row, expert] = this.#cell;
    const { layers, values } = this.#shown;
    const value = values[row]?.[expert];
    if (value === undefined) return;
    const share = this.#middle ? `${value.toFixed(2)} of a fair share` : `${value >= 0 ? "+" : ""}${value.toFixed(2)} fair shares`;
    this.#said.textContent = `layer ${layers[row]}, expert ${expert}: ${share}`;
  }

  // All values where they fit, else the experts furthest from the middle.
  #tabulate() {
    while (this.#more.childElementCount > 1) this.#more.lastChild.remove();
    const { layers, values } = this.#shown;
    if (!this.#more.open || !values.length) return;
    const made = values[0].length <= WIDE_TABLE
      ? table(["layer", ...values[0].keys()], values.map((row, i) => [layers[i], ...row.map((value) => value.toFixed(2))]), true)
      : table(["layer", "furthest from the middle"], values.map((row, i) => [layers[i], this.#furthest(row)]));
    made.setAttribute("aria-label", this.#name);
    this.#more.append(element("div", { className: "wide" }, made));
  }

  #furthest(row) {
    const ranked = [...row.entries()].sort((a, b) => Math.abs(b[1] - this.#middle) - Math.abs(a[1] - this.#middle));
    return ranked.slice(0, NAMED).map(([expert, value]) => `${expert}: ${value.toFixed(2)}`).join("  ");
  }
}

export const note = (counts) => `${counts.tokens.toLocaleString("en")} tokens, ${counts.layers.length} layers, `
  + `${counts.wide} experts: grey is a fair share, red more, blue less.`;
