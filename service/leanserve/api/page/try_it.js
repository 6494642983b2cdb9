// Try it: an input as the base takes it (a drawing, a file, a sentence, JSON), asked of every variant one after the other, so
// that none waits for another; or asked again and again of whoever the traffic split chooses.

import { Answers } from "./answers.js";
import { el, find, say } from "./dom.js";
import { Pad, png } from "./drawing.js";
import { predict } from "./service.js";

const SMALL = 64;
const TYPED_MS = 400;
const PER_S = 25;
const MOST_WAITING = 50;
const EXAMPLE = "The quick brown fox jumps over the lazy dog.";

/** Which ways there are to give an input, by what the base says of itself. */
function waysFor({ kind, inputs, example }) {
  const [channels, height, width] = inputs[0].shape;
  const isSmallGrey = kind === "image" && channels === 1 && height <= SMALL && width <= SMALL;
  return [
    ...(isSmallGrey ? [["Draw", (owner) => new Drawing(owner, width, height)]] : []),
    ...(kind === "image" ? [["Image", (owner) => new File(owner, "image")]] : []),
    ...(kind === "audio" ? [["Sound", (owner) => new File(owner, "audio")]] : []),
    ...(kind === "text" ? [["Sentence", (owner) => new Typed(owner, "text/plain", "A sentence", EXAMPLE)]] : []),
    ["JSON", (owner) => new Typed(owner, "application/json", "A body for POST /v1/predict", example ? JSON.stringify(example) : '{"inputs": }')],
  ];
}

class Drawing {
  constructor(owner, width, height) {
    Object.assign(this, { owner, width, height });
    this.pad = new Pad(() => this.drawn());
    this.small = el("canvas", { width, height, class: "seen", role: "img", "aria-label": "what the model gets" });
    const clear = el("button", { type: "button", onclick: () => { this.pad.clear(); this.drawn(); } }, "Clear");
    this.element = el("div", {},
      el("div", { class: "pad-frame" }, this.pad.element, this.hint = el("p", { class: "hint", "aria-hidden": "true" }, "draw here")),
      el("div", { class: "row" }, clear, el("figure", { class: "small" }, this.small, el("figcaption", {}, `what the model gets: ${width} × ${height}`))));
  }

  drawn() {
    this.hint.hidden = !this.pad.empty;
    this.small.getContext("2d").drawImage(this.pad.image(this.width, this.height), 0, 0);
    this.owner.changed();
  }

  input(varied = false) {
    if (this.pad.empty) return null;
    const off = (most) => (varied ? (2 * Math.random() - 1) * most : 0);
    const image = this.pad.image(this.width, this.height, { turned: off(0.12), shifted: [off(0.05) * this.width, off(0.03) * this.height], scaled: 1 - Math.abs(off(0.1)) });
    return png(image).then((body) => ({ type: "image/png", body }));
  }
}

class File {
  constructor(owner, kind) {
    this.owner = owner;
    this.chooser = el("input", { type: "file", accept: `${kind}/*`, class: "unseen", tabindex: "-1", "aria-hidden": "true" });
    this.shown = el("span", {}, kind === "image" ? "Drop an image, paste one, or choose a file" : "Drop a recording, or choose a file");
    this.element = el("div", {}, el("button", { type: "button", class: "drop", onclick: () => this.chooser.click() }, this.shown), this.chooser);
    this.chooser.addEventListener("change", () => this.take(this.chooser.files[0]));
    this.element.addEventListener("dragover", (event) => event.preventDefault());
    this.element.addEventListener("drop", (event) => { event.preventDefault(); this.take(event.dataTransfer.files[0]); });
  }

  take(file) {
    if (!file) return;
    this.file = file;
    const isImage = file.type.startsWith("image/");
    const shown = isImage ? el("img", { src: URL.createObjectURL(file), alt: file.name }) : el("span", {}, file.name);
    shown.addEventListener("load", () => URL.revokeObjectURL(shown.src));
    this.shown.replaceChildren(shown);
    this.owner.changed();
  }

  input() {
    return this.file ? { type: this.file.type || "application/octet-stream", body: this.file } : null;
  }
}

class Typed {
  constructor(owner, type, label, text) {
    this.type = type;
    this.area = el("textarea", { rows: "7", spellcheck: "false", "aria-label": label });
    this.area.value = text;
    this.area.addEventListener("input", () => { clearTimeout(this.timer); this.timer = setTimeout(() => owner.changed(), TYPED_MS); });
    this.element = el("div", {}, this.area, el("div", { class: "row" }, el("button", { type: "button", class: "primary", onclick: () => owner.changed() }, "Ask all")));
  }

  input() {
    return this.area.value.trim() ? { type: this.type, body: this.area.value } : null;
  }
}

export class TryIt {
  constructor(section, { base, report, variants }) {
    this.answers = new Answers(find(".answers", section), { report, variants });
    this.given = find(".given", section);
    this.serving = [...variants.keys()];
    this.asked = 0;
    this.repeat = el("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggleTraffic() });
    this.sent = el("span", { class: "note" });
    this.tabs(find(".tabs", section), waysFor(base));
    this.aborted = new AbortController();
    section.addEventListener("paste", (event) => this.way.take?.(event.clipboardData.files[0]), { signal: this.aborted.signal });
    this.stopTraffic();
  }

  end() {
    this.aborted.abort();
    this.stopTraffic();
  }

  tabs(list, ways) {
    const made = ways.map(([, make]) => make(this));
    const buttons = ways.map(([title], index) => el("button", { type: "button", role: "tab", id: `way-${index}`, "aria-controls": "given", onclick: () => choose(index) }, title));
    const choose = (index) => {
      buttons.forEach((button, other) => {
        button.setAttribute("aria-selected", String(other === index));
        button.tabIndex = other === index ? 0 : -1;
      });
      this.way = made[index];
      this.given.replaceChildren(this.way.element, el("div", { class: "row traffic" }, this.repeat, this.sent));
      this.given.setAttribute("aria-labelledby", `way-${index}`);
      this.answers.clear(this.way instanceof Drawing ? "Draw something: every variant is asked at once." : "Every variant is asked the same.");
    };
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (made.indexOf(this.way) + step + made.length) % made.length;
      choose(next);
      buttons[next].focus();
    });
    Object.assign(this.given, { id: "given" }).setAttribute("role", "tabpanel");
    list.replaceChildren(...buttons);
    choose(0);
  }

  update(snapshot) {
    this.serving = snapshot.variants.filter((variant) => variant.state === "serving").map((variant) => variant.name);
    for (const { name, state } of snapshot.variants) if (state !== "serving") this.answers.away(name, state);
  }

  /** Ask every variant what it says of the input as it is now; an input that comes meanwhile is asked instead. */
  async changed() {
    const turn = ++this.asked;
    const input = await this.way.input();
    if (turn !== this.asked) return;
    if (!input) { this.answers.clear("Nothing to ask."); return; }
    this.answers.waiting("Asking …");
    for (const name of this.serving) {
      const told = await predict(input, name).catch((error) => error);
      if (turn !== this.asked) return;
      if (told instanceof Error) this.answers.refused(name, told);
      else this.answers.show(name, told);
    }
    this.answers.done();
  }

  toggleTraffic() {
    if (this.timer) { this.stopTraffic(); return; }
    let sent = 0, waiting = 0, failed = 0;
    const tell = () => say(this.sent, `${sent} sent${failed ? `, ${failed} refused` : ""}`);
    this.repeat.setAttribute("aria-pressed", "true");
    say(this.repeat, "Stop asking");
    this.timer = setInterval(async () => {
      const input = waiting < MOST_WAITING ? await this.way.input(true) : null;
      if (!input || !this.timer) return;
      waiting += 1;
      await predict(input).then(() => { sent += 1; }, () => { failed += 1; });
      waiting -= 1;
      tell();
    }, 1000 / PER_S);
  }

  stopTraffic() {
    clearInterval(this.timer);
    this.timer = null;
    this.repeat.setAttribute("aria-pressed", "false");
    this.repeat.title = "Each is a little shifted and turned where it is a drawing; the traffic split decides who answers";
    say(this.repeat, `Keep asking, ${PER_S} per second`);
  }
}
