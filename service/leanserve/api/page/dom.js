// Elements and numbers: the few functions by which every part of the page makes what it shows. Text is only ever set
// as text, so that no name or answer can become markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
export const find = (selector, within = document) => within.querySelector(selector);

/** Set text only where it changed: screen readers and selections are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const DASH = "–";
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** About three digits: 0.123, 1.23, 12.3, 123, 1,234. */
export function number(value) {
  if (!known(value)) return DASH;
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en", { minimumFractionDigits: Math.min(digits, 3), maximumFractionDigits: Math.min(digits, 3) });
}

export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : DASH);
export const percent = (value, digits = 0) => (known(value) ? `${(100 * value).toFixed(digits)} %` : DASH);
export const times = (value) => (known(value) ? `${number(value)}×` : DASH);

export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(1, value)) / 3)));
  return `${number(value / 1000 ** power)} ${units[power]}`;
}

export function money(value, currency) {
  if (!known(value)) return DASH;
  const sign = { USD: "$", EUR: "€", GBP: "£" }[currency] ?? `${currency} `;
  return `${sign}${number(value)}`;
}

const probe = el("i", { hidden: true });

/** A colour of the style sheet, as a canvas takes it, light or dark as the page is now. */
export function colour(name) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

/** The numbered mark that stands for a variant all over the page, in its colour. */
export const badge = (variant) => el("i", { class: `badge c${variant.colour}`, "aria-hidden": "true" }, String(variant.number || "B"));
