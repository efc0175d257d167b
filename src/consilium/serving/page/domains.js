"use strict";
// Which of a few domains the experts of a token belong to, measured on short texts of each.

import { post } from "./api.js";

const SAMPLES = {
  prose: `The ferry left an hour late, and nobody on the quay seemed to mind. An old woman sold pears out of a basket,
two boys counted gulls, and the captain, who had once been a teacher, read a newspaper from the day before. When the
fog lifted at last, the island lay so near that one could see the washing on the lines behind the white houses.`,
  code: `def merge(left, right):
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i]); i += 1
        else:
            merged.append(right[j]); j += 1
    return merged + left[i:] + right[j:]

class Counter:
    def __init__(self, start=0):
        self.value = start`,
  mathematics: `Let f(x) = x^2 - 6x + 5. Completing the square gives f(x) = (x - 3)^2 - 4, so the minimum is -4 at x = 3
and the roots are x = 1 and x = 5. If 3a + 2b = 16 and a - b = 2, then a = 4 and b = 2, since 3 * 4 + 2 * 2 = 16.
The sum 1 + 2 + ... + n equals n(n + 1)/2; for n = 100 it is 5050, and 12 * 13 = 156.`,
  dialogue: `"Are you coming tonight?" "I said I might." "That means no, doesn't it?" "It means I have to ask my sister
first." "Then ask her! What are you waiting for?" "All right, all right. Hello? Yes, it's me. Could you take the dog?
You can? Thanks!" "Well?" "She says yes. Where do we meet?" "At the corner, at eight. Don't be late!"`,
};

export const DOMAINS = Object.keys(SAMPLES);

// [domain][layer] -> Map of expert to its share of the choices there, once measured.
const profiles = [];

export const domainHue = (place) => (place * 360) / DOMAINS.length + 20;
export const measured = () => profiles.length > 0;

function profile(choice) {
  return choice.routed_layers.map((_, layer) => {
    const counts = new Map();
    let all = 0;
    for (const token of choice.prompt_routed_experts) {
      for (const expert of token[layer]) {
        if (expert < 0) continue;
        counts.set(expert, (counts.get(expert) ?? 0) + 1);
        all += 1;
      }
    }
    for (const [expert, count] of counts) counts.set(expert, count / all);
    return counts;
  });
}

// A character is a token at the most, and what does not fit is left out.
export async function measure({ name: model, length }) {
  const found = [];
  for (const text of Object.values(SAMPLES)) {
    const prompt = text.slice(0, length - 8);
    const body = { model, prompt, max_tokens: 1, temperature: 0, return_routed_experts: true };
    const { choices: [choice] } = await (await post("v1/completions", body)).json();
    if (!choice.routed_layers?.length) throw new Error("this model has no experts");
    found.push(profile(choice));
  }
  profiles.splice(0, profiles.length, ...found);
}

// The number of the domain in whose text the token's experts of this layer are most at home; null where unknown.
export function affinity(token, layer) {
  const experts = token.experts?.[layer]?.filter((expert) => expert >= 0);
  if (!experts?.length || !profiles.length) return null;
  const near = profiles.map((layers) => (
    experts.reduce((sum, expert) => sum + Math.log((layers[layer]?.get(expert) ?? 0) + 1e-3), 0)
  ));
  return near.indexOf(Math.max(...near));
}
