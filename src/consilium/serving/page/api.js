"use strict";
// How the page asks its own server, and nobody else.

export function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export async function ask(path, { headers: more = {}, ...options } = {}) {
  const answer = await fetch(path, { headers: { ...headers(), ...more }, ...options });
  if (answer.ok || answer.status === 304) return answer;
  if (answer.status === 401) {
    document.dispatchEvent(new Event("needs-key"));
    throw new Error("this server needs a key");
  }
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

export const get = async (path) => (await ask(path)).json();

export const post = (path, body, signal) => ask(path, { method: "POST", body: JSON.stringify(body), signal });

// Server-sent events of one answer, as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// A token: {text, prompt, logprob, top, experts, weights, runners, margins}. The last four are of each layer,
// null until it is computed, as the last token of an answer never is.
const token = (text, more) => ({
  text, prompt: false, logprob: null, top: [], experts: null, weights: null, runners: null, margins: null, ...more,
});

function routed(one, place, told, prefix = "") {
  one.experts = told[`${prefix}routed_experts`][place];
  one.weights = told[`${prefix}routed_weights`][place];
  one.runners = told[`${prefix}runner_up_experts`]?.[place] ?? null;
  one.margins = told[`${prefix}routed_margins`]?.[place] ?? null;
}

// What is shown of a token: a character of several tokens comes with the last of them.
function reader() {
  const decoder = new TextDecoder();
  return (bytes, text) => (bytes?.length ? decoder.decode(new Uint8Array(bytes), { stream: true }) || "\u00b7" : text);
}

function promptTokens(texts) {
  const read = reader();
  const bytes = (text) => (/^bytes:(\\x[0-9a-f]{2})+$/.test(text)
    ? text.slice(6).match(/[0-9a-f]{2}/g).map((pair) => parseInt(pair, 16))
    : null);
  return texts.map((text) => token(read(bytes(text), text), { prompt: true }));
}

const prompts = new WeakMap();
// What a token of a prompt belongs to: {ids, steering, tokens, scored}.
export const promptOf = (one) => prompts.get(one);

// What might have come in place of each token of a prompt: asked for once, of all of them, by who looks at one.
export function score(prompt) {
  prompt.scoring ??= (async () => {
    const body = { prompt: prompt.ids, echo: true, logprobs: 5, max_tokens: 0, ...prompt.steering };
    const { logprobs: found } = (await (await post("v1/completions", body)).json()).choices[0];
    prompt.tokens.forEach((one, place) => {
      one.logprob = found.token_logprobs[place];
      one.top = Object.entries(found.top_logprobs[place] ?? {})
        .map(([text, logprob]) => ({ token: text, logprob }))
        .sort((one, other) => other.logprob - one.logprob)
        .slice(0, 5);
    });
    prompt.scored = true;
  })().catch((error) => {
    prompt.scoring = null; // the next look asks again
    throw error;
  });
  return prompt.scoring;
}

export const nothing = () => ({ prompt: [], tokens: [], text: "", finish: null });

// Asks for the next turn of a conversation and fills `answer`, which has what came where the rest never does.
// `told` hears of layers, of tokens, and of tokens whose experts are known.
export async function generate(asked, told, { answer = nothing(), signal } = {}) {
  const body = {
    stream: true, logprobs: true, top_logprobs: 5, return_routed_experts: true, return_token_ids: true, ...asked,
  };
  const read = reader();
  let known = 0;
  for await (const event of events(await post("v1/chat/completions", body, signal))) {
    if (event.prompt_token_strs && !answer.prompt.length) {
      const { mute_experts, experts_per_token } = asked;
      const steering = { mute_experts, experts_per_token };
      answer.prompt = promptTokens(event.prompt_token_strs);
      const prompt = { ids: event.prompt_token_ids, steering, tokens: answer.prompt, scored: false };
      answer.prompt.forEach((one) => prompts.set(one, prompt));
      told.tokens(answer.prompt);
    }
    const choice = event.choices[0];
    if (!choice) continue;
    answer.text += choice.delta?.content ?? "";
    answer.finish = choice.finish_reason ?? answer.finish;
    if (choice.routed_layers) told.layers(choice.routed_layers);
    if (choice.prompt_routed_experts) {
      answer.prompt.forEach((one, place) => routed(one, place, choice, "prompt_"));
      told.routed(answer.prompt);
    }
    const later = answer.tokens.slice(known, known + (choice.routed_experts?.length ?? 0));
    later.forEach((one, place) => routed(one, place, choice));
    known += later.length;
    told.routed(later);
    const fresh = (choice.logprobs?.content ?? []).map((one) => token(
      read(one.bytes, one.token), { logprob: one.logprob, top: one.top_logprobs },
    ));
    answer.tokens.push(...fresh);
    told.tokens(fresh);
  }
  return answer;
}
