// A pad to draw on: light ink on black, by mouse, finger, pen or keyboard, and the small image that the model gets.

import { el } from "./dom.js";

const SIDE = 280;
const INK = 22;
const STEP = 10;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOLD = "A pad to draw on. With the keyboard: the arrow keys move the pen, Space puts it down and lifts it, Delete clears.";

const canvas = (width, height, attributes) => el("canvas", { width, height, ...attributes });

export class Pad {
  constructor(changed) {
    this.changed = changed;
    this.element = canvas(SIDE, SIDE, { class: "pad", tabindex: "0", role: "img", "aria-label": TOLD });
    this.context = this.element.getContext("2d", { willReadFrequently: true });
    this.pen = { x: SIDE / 2, y: SIDE / 2, down: false };
    this.clear();
    this.element.addEventListener("pointerdown", (event) => this.begin(event));
    this.element.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) this.element.addEventListener(end, () => this.end());
    this.element.addEventListener("keydown", (event) => this.typed(event));
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, SIDE, SIDE);
    this.empty = true;
  }

  point(event) {
    const box = this.element.getBoundingClientRect();
    return { x: ((event.clientX - box.left) * SIDE) / box.width, y: ((event.clientY - box.top) * SIDE) / box.height };
  }

  begin(event) {
    event.preventDefault();
    this.element.focus({ preventScroll: true });
    this.element.setPointerCapture(event.pointerId);
    this.last = this.point(event);
    this.line(this.last, this.last);
  }

  move(event) {
    if (!this.last) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const point = this.point(each);
      this.line(this.last, point);
      this.last = point;
    }
  }

  end() {
    if (!this.last) return;
    this.last = null;
    this.changed();
  }

  typed(event) {
    if (event.key === "Delete" || event.key === "Backspace") { this.clear(); this.changed(); }
    else if (event.key === " ") { this.pen.down = !this.pen.down; if (this.pen.down) this.line(this.pen, this.pen); this.changed(); }
    else if (event.key in KEYS) {
      const [x, y] = KEYS[event.key].map((direction, axis) => Math.min(SIDE, Math.max(0, this.pen[axis ? "y" : "x"] + direction * STEP)));
      if (this.pen.down) this.line(this.pen, { x, y });
      Object.assign(this.pen, { x, y });
      if (this.pen.down) this.changed();
    } else return;
    event.preventDefault();
  }

  line(from, to) {
    Object.assign(this.context, { strokeStyle: "#fff", lineWidth: INK, lineCap: "round", lineJoin: "round" });
    this.context.beginPath();
    this.context.moveTo(from.x, from.y);
    this.context.lineTo(to.x, to.y + 0.01);
    this.context.stroke();
    this.empty = false;
  }

  /** The smallest box around the ink. */
  box() {
    const { data } = this.context.getImageData(0, 0, SIDE, SIDE);
    let [left, top, right, bottom] = [SIDE, SIDE, 0, 0];
    for (let index = 0; index < data.length; index += 4) {
      if (data[index] < 64) continue;
      const x = (index / 4) % SIDE, y = Math.floor(index / 4 / SIDE);
      left = Math.min(left, x); right = Math.max(right, x);
      top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
    return right >= left ? { left, top, width: right - left + 1, height: bottom - top + 1 } : null;
  }

  /** The ink, filling the height and in the middle, as in the data of handwritten characters; `turned` is in radians. */
  image(width, height, { turned = 0, shifted = [0, 0], scaled = 1 } = {}) {
    const made = canvas(width, height, {});
    const box = this.box(), context = made.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    if (!box) return made;
    const size = scaled * Math.min(height / box.height, width / box.width);
    context.imageSmoothingQuality = "high";
    context.translate(width / 2 + shifted[0], height / 2 + shifted[1]);
    context.rotate(turned);
    context.drawImage(this.element, box.left, box.top, box.width, box.height, (-size * box.width) / 2, (-size * box.height) / 2, size * box.width, size * box.height);
    return made;
  }
}

export const png = (image) => new Promise((done) => image.toBlob(done, "image/png"));
