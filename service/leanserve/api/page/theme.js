// Light or dark: as the system has it, until somebody chooses; the choice is kept for the next visit.

import { find, say } from "./dom.js";

const NEXT = { auto: "light", light: "dark", dark: "auto" };
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };
const listeners = [];

export const onTheme = (listener) => listeners.push(listener);

function kept() {
  try { return localStorage.getItem("theme") in NEXT ? localStorage.getItem("theme") : "auto"; }
  catch { return "auto"; }  // storage is forbidden here
}

function show(theme) {
  document.documentElement.dataset.theme = theme;
  const button = find("#theme");
  say(find("span", button), SIGNS[theme]);
  say(find("b", button), `Colours: ${theme}`);
  button.title = `Colours: ${theme}`;
  listeners.forEach((listener) => listener());
}

export function startTheme() {
  show(kept());
  find("#theme").addEventListener("click", () => {
    const theme = NEXT[document.documentElement.dataset.theme];
    try { localStorage.setItem("theme", theme); } catch { /* for this visit only */ }
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => listeners.forEach((listener) => listener()));
}
