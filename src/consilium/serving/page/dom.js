"use strict";
// Small pieces of the page.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria")) made.setAttribute(`aria-${name.slice(4).toLowerCase()}`, value);
    else if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A table; without a head the first cell of each row is its name.
export function table(head, rows, numbers = false) {
  const line = (kind, values) => element("tr", {}, ...values.map((value, place) => element(
    head || place ? kind : "th",
    kind === "th" ? { scope: "col" } : { className: numbers && place ? "number" : "" },
    ...(Array.isArray(value) ? value : [value]),
  )));
  return element("table", {}, ...(head ? [line("th", head)] : []), ...rows.map((values) => line("td", values)));
}

// Says what happened, or what went wrong, in the line of this id.
export function tell(id, what) {
  const line = $(id);
  line.textContent = what?.message ?? String(what ?? "");
  line.classList.toggle("error", what instanceof Error);
}

// A colour for a number of a few, far from its neighbours' colours.
export const hue = (number) => (number * 137.508) % 360;

export function download(name, value) {
  const link = element("a", {
    href: URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" })),
    download: name,
  });
  link.click();
  URL.revokeObjectURL(link.href);
}
