"use strict";
// Tokens as chips: how they are made, coloured and walked through.

import { affinity, domainHue } from "./domains.js";
import { element, hue } from "./dom.js";

// What all chips of the page share.
export const view = { colour: "expert", layer: 0, layers: [] };

const PART = 400;
const chips = new WeakMap();
const tokens = new WeakMap();

function colour(token) {
  if (view.colour === "confidence") {
    return token.logprob === null ? "" : `hsl(${120 * Math.exp(token.logprob)} 70% 50% / .35)`;
  }
  if (view.colour === "domain") {
    const found = affinity(token, view.layer);
    return found === null ? "" : `hsl(${domainHue(found)} 70% 50% / .35)`;
  }
  const expert = token.experts?.[view.layer]?.[0];
  return view.colour === "expert" && expert !== undefined && expert >= 0 ? `hsl(${hue(expert)} 70% 50% / .35)` : "";
}

export function paint(some) {
  for (const token of some) {
    const chip = chips.get(token);
    if (chip) chip.style.background = colour(token);
  }
}

export function repaint() {
  for (const chip of document.querySelectorAll(".chip")) chip.style.background = colour(tokens.get(chip));
}

export const tokenOf = (chip) => tokens.get(chip);
export const chipOf = (token) => chips.get(token);

function made(token) {
  const chip = element("span", { className: "chip", role: "button", tabIndex: -1 });
  chip.textContent = token.text.replaceAll("\n", "\u21b5\n");
  if (!token.text.trim()) chip.setAttribute("aria-label", token.text.includes("\n") ? "line end" : "space");
  chip.style.background = colour(token);
  chips.set(token, chip);
  tokens.set(chip, token);
  return chip;
}

// The chips of one text. They are added once a frame, in parts that begin with a line: a browser lays out anew
// what has changed, and leaves out parts that nobody sees.
export class Strip {
  #into; #waiting = []; #asked = false; #part = null; #grown;

  constructor(into, grown = () => {}) {
    this.#into = into;
    this.#grown = grown;
  }

  add(some) {
    if (!some.length) return;
    this.#waiting = this.#waiting.concat(some);
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.#asked = false;
    if (!this.#waiting.length) return;
    const first = !this.#into.querySelector(".chip");
    for (const token of this.#waiting) {
      if (this.#part === null || (this.#part.childElementCount >= PART && this.#part.ended)) {
        this.#part = element("div", { className: "part" });
        this.#into.append(this.#part);
      }
      this.#part.append(made(token));
      this.#part.ended = token.text.endsWith("\n");
    }
    if (first) this.#into.querySelector(".chip").tabIndex = 0;
    this.#waiting = [];
    this.#grown();
  }
}

function beside(chip, step) {
  const near = step > 0 ? chip.nextElementSibling : chip.previousElementSibling;
  if (near) return near;
  const part = step > 0 ? chip.parentElement.nextElementSibling : chip.parentElement.previousElementSibling;
  return step > 0 ? part?.firstElementChild : part?.lastElementChild;
}

// Lets a reader click chips in `box`, or walk with the arrow keys and press Enter.
export function walkable(box, show) {
  box.addEventListener("click", (event) => {
    if (tokens.has(event.target)) show(event.target);
  });
  box.addEventListener("keydown", (event) => {
    const chip = event.target;
    if (!tokens.has(chip)) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      show(chip);
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      const next = beside(chip, event.key === "ArrowRight" ? 1 : -1);
      if (!next || !tokens.has(next)) return;
      chip.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  });
}
