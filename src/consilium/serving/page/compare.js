"use strict";
// Two prompts side by side, each with the loads of its experts, and what lies between them.

import { generate } from "./api.js";
import { asked, learnLayers } from "./chat.js";
import { paint, Strip } from "./chips.js";
import { $, tell } from "./dom.js";
import { Counts, Heat, note } from "./heat.js";

const heats = { a: new Heat($("heat-a"), "Loads of A"), b: new Heat($("heat-b"), "Loads of B") };
const difference = new Heat($("heat-difference"), "Loads of A less those of B", 0);

async function one(side) {
  const counts = new Counts();
  const into = $(`answer-${side}`);
  into.replaceChildren();
  const strip = new Strip(into);
  const told = {
    layers(layers) {
      learnLayers(layers);
      counts.learn(layers);
    },
    tokens: (tokens) => strip.add(tokens),
    routed(tokens) {
      const known = tokens.filter((token) => token.experts);
      counts.add(known);
      paint(known);
    },
  };
  const messages = [{ role: "user", content: $(`prompt-${side}`).value }];
  await generate({ ...asked(), messages }, told);
  strip.flush();
  return counts;
}

function draw(a, b) {
  const wide = Math.max(a.wide, b.wide);
  const [first, second] = [a.shares(wide), b.shares(wide)];
  heats.a.show(a.layers, first, note(a));
  heats.b.show(b.layers, second, note(b));
  const less = first.map((row, layer) => row.map((value, expert) => value - second[layer][expert]));
  difference.show(a.layers, less, "Red is more in A, blue is more in B, grey is alike; in fair shares.");
}

$("compare-ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("compare-send").disabled = true;
  tell("compare-status", "both are being answered");
  try {
    const [a, b] = await Promise.all(["a", "b"].map(one));
    draw(a, b);
    tell("compare-status", a.layers.length ? "compared" : "this model has no experts");
  } catch (error) {
    tell("compare-status", error);
  } finally {
    $("compare-send").disabled = false;
  }
});
