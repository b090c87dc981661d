// A run's spans and reads as bars over time, on one canvas: zoom, pan, and what is under the pointer.
// Everything it draws comes with the model's traits; it fetches nothing.

const ROW = 20, TOP = 30, LEFT = 92, RIGHT = 8;
const STEPS = [1, 2, 5, 10];

function typed(view, Kind) {
  const start = view.byteOffset;
  return new Kind(view.buffer.slice(start, start + view.byteLength));
}

function rowRanges(rows, count) {
  // Items are sorted by row, then by start.
  const ranges = Array.from({ length: count }, () => [0, 0]);
  for (let i = 0; i < rows.length; i++) {
    if (i === 0 || rows[i] !== rows[i - 1]) ranges[rows[i]][0] = i;
    ranges[rows[i]][1] = i + 1;
  }
  return ranges;
}

function firstEndingAfter(ends, [low, high], time) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > time) high = middle;
    else low = middle + 1;
  }
  return low;
}

function tickStep(span, room) {
  const least = (span * 80) / room;
  const scale = 10 ** Math.floor(Math.log10(least));
  return STEPS.map((step) => step * scale).find((step) => step >= least);
}

function bytesInWords(nbytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (nbytes >= scale) return `${(nbytes / scale).toPrecision(3)} ${unit}`;
  return `${nbytes} B`;
}

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

class Timeline {
  constructor(model, el) {
    this.model = model;
    this.names = model.get("names");
    const times = typed(model.get("times"), Float64Array);
    const numbers = typed(model.get("numbers"), Int32Array);
    const n = (this.count = times.length / 2);
    this.start = times.subarray(0, n);
    this.end = times.subarray(n);
    ["row", "colour", "stage", "layer", "expert", "token", "nbytes"].forEach((name, at) => {
      this[name] = numbers.subarray(at * n, (at + 1) * n);
    });
    this.ranges = rowRanges(this.row, this.names.rows.length);
    this.at = -1; // the item that is told about
    this.build(el);
    this.listen();
    this.resize();
  }

  build(el) {
    this.canvas = make("canvas", {
      class: "fm-canvas", tabindex: "0", role: "application",
      "aria-label": "Timeline. Left and right pan, plus and minus zoom, up and down change the row, " +
        "n and p go to the next and the previous item, Home shows the whole run.",
    });
    this.token_box = make("input", {
      type: "number", min: "0", max: String(this.names.last_token), class: "fm-token",
      "aria-label": "token to show",
    });
    const button = (words, title, act) => {
      const found = make("button", { type: "button", title, class: "fm-button" }, words);
      found.addEventListener("click", act);
      return found;
    };
    this.bar = make("div", { class: "fm-bar" },
      button("Whole run", "Show the whole run (Home)", () => this.whole()),
      button("+", "Zoom in (+)", () => this.zoom(0.5)),
      button("−", "Zoom out (-)", () => this.zoom(2)),
      make("label", { class: "fm-label" }, "token ", this.token_box),
      ...this.names.colours.map(({ colour, words }) =>
        make("span", { class: "fm-key" },
          make("span", { class: "fm-swatch", style: `background:${colour}` }), words)));
    this.told = make("div", { class: "fm-told", role: "status", "aria-live": "polite" },
      "Point at a bar. Drag to pan; Ctrl and the wheel, or + and -, zoom.");
    this.root = make("div", { class: "fm-timeline" }, this.bar, this.canvas, this.told);
    el.append(this.root);
    this.height = TOP + ROW * this.names.rows.length + 6;
  }

  listen() {
    const canvas = this.canvas;
    const inside = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== canvas) return; // the page's to scroll
      event.preventDefault();
      this.zoom(2 ** (event.deltaY / 240), this.timeAt(inside(event)));
    }, { passive: false });
    let grabbed = null;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      grabbed = { x: inside(event), low: this.low, high: this.high };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!grabbed) return this.point(inside(event), event.offsetY);
      const moved = ((inside(event) - grabbed.x) / this.room) * (grabbed.high - grabbed.low);
      this.show(grabbed.low - moved, grabbed.high - moved);
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, () => { grabbed = null; });
    canvas.addEventListener("dblclick", () => this.whole());
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.token_box.addEventListener("change", () => {
      this.model.set("token", Number(this.token_box.value));
      this.model.save_changes();
    });
    this.heard = [["change:window", () => this.fromModel()], ["change:token", () => this.goto()]];
    for (const [name, act] of this.heard) this.model.on(name, act);
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.root);
    this.themes = new MutationObserver(() => this.draw());
    this.themes.observe(document.body, { attributes: true });
  }

  close() {
    for (const [name, act] of this.heard) this.model.off(name, act);
    this.sizes.disconnect();
    this.themes.disconnect();
  }

  key(event) {
    const span = this.high - this.low;
    const acts = {
      ArrowLeft: () => this.show(this.low - span / 5, this.high - span / 5),
      ArrowRight: () => this.show(this.low + span / 5, this.high + span / 5),
      ArrowUp: () => this.other(-1), ArrowDown: () => this.other(1),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
      Home: () => this.whole(), n: () => this.step(1), p: () => this.step(-1),
    };
    if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // these are the notebook's keys too
    acts[event.key]();
  }

  // Where it looks

  fromModel() {
    const [low, high] = this.model.get("window");
    if (low !== this.low || high !== this.high) this.show(low, high);
  }

  whole() { this.show(0, this.names.dur_ms); }

  goto() {
    const token = this.model.get("token");
    if (token === null) return;
    this.token_box.value = token;
    const found = this.names.passes.find(([first, last]) => first <= token && token <= last);
    if (found) this.show(found[2], found[3]);
  }

  zoom(factor, about) {
    const [low, high] = [this.low, this.high];
    const middle = about ?? (low + high) / 2;
    this.show(middle - (middle - low) * factor, middle + (high - middle) * factor);
  }

  show(low, high) {
    const whole = this.names.dur_ms;
    const span = Math.min(Math.max(high - low, whole * 1e-7, 1e-5), whole);
    this.low = Math.min(Math.max(low, 0), whole - span);
    this.high = this.low + span;
    this.draw();
    clearTimeout(this.saving);
    this.saving = setTimeout(() => {
      this.model.set("window", [this.low, this.high]);
      this.model.save_changes();
    }, 150);
  }

  // What is told

  point(x, y) {
    const row = Math.floor((y - TOP) / ROW);
    if (row < 0 || row >= this.ranges.length || x < LEFT) return this.tell(-1);
    // A bar is drawn at least a pixel wide, and found as wide as that.
    const slack = (this.high - this.low) / this.room;
    const time = this.timeAt(x);
    const found = firstEndingAfter(this.end, this.ranges[row], time - slack);
    const hit = found < this.ranges[row][1] && this.start[found] <= time + slack;
    this.tell(hit ? found : -1);
  }

  step(by) {
    const row = this.at < 0 ? 0 : this.row[this.at];
    const [first, past] = this.ranges[row];
    if (first === past) return;
    const at = this.at < 0 ? firstEndingAfter(this.end, [first, past], this.low) : this.at + by;
    this.reach(Math.min(Math.max(at, first), past - 1));
  }

  other(by) {
    const middle = this.at < 0 ? this.low : this.start[this.at];
    let row = this.at < 0 ? (by > 0 ? -1 : this.ranges.length) : this.row[this.at];
    do row += by; while (row in this.ranges && this.ranges[row][0] === this.ranges[row][1]);
    if (!(row in this.ranges)) return;
    this.reach(Math.min(firstEndingAfter(this.end, this.ranges[row], middle), this.ranges[row][1] - 1));
  }

  reach(at) {
    const span = this.high - this.low;
    const middle = (this.start[at] + this.end[at]) / 2;
    if (middle < this.low || middle > this.high) this.show(middle - span / 2, middle + span / 2);
    this.tell(at);
  }

  tell(at) {
    if (at === this.at) return;
    this.at = at;
    this.draw();
    if (at < 0) return;
    const ms = (time) => time.toFixed(3);
    const dur = this.end[at] - this.start[at];
    const text = this.names.texts[this.token[at]];
    const where = this.layer[at] < 0 ? "" : `layer ${this.layer[at]}`;
    const what = this.expert[at] < 0
      ? [this.names.stages[this.stage[at]], where, this.names.colours[this.colour[at]].words]
      : [where, `expert ${this.expert[at]}`, bytesInWords(this.nbytes[at]),
         this.names.colours[this.colour[at]].words, this.names.rows[this.row[at]]];
    const token = `token ${this.token[at]}` + (text === undefined ? "" : ` ${JSON.stringify(text)}`);
    this.told.textContent = [...what, `${ms(dur)} ms`, `at ${ms(this.start[at])} ms`, token]
      .filter((part) => part).join(" · ");
  }

  // Drawing

  timeAt(x) { return this.low + ((x - LEFT) / this.room) * (this.high - this.low); }

  resize() {
    const width = this.root.clientWidth;
    if (!width) return;
    const dense = window.devicePixelRatio || 1;
    this.width = width;
    this.room = Math.max(width - LEFT - RIGHT, 50);
    this.canvas.width = width * dense;
    this.canvas.height = this.height * dense;
    this.canvas.style.height = `${this.height}px`;
    this.pen = this.canvas.getContext("2d");
    this.pen.setTransform(dense, 0, 0, dense, 0, 0);
    if (this.low === undefined) {
      [this.low, this.high] = this.model.get("window");
      this.goto();
    }
    this.draw();
  }

  draw() {
    if (!this.pen) return;
    const pen = this.pen, css = getComputedStyle(this.root);
    const ink = css.color, faint = css.getPropertyValue("--fm-faint").trim() || "#888";
    pen.clearRect(0, 0, this.width, this.height);
    pen.font = `11px ${css.fontFamily}`;
    this.drawAxis(pen, ink, faint);
    pen.fillStyle = ink;
    pen.textAlign = "right";
    this.names.rows.forEach((name, row) => pen.fillText(name, LEFT - 8, TOP + ROW * row + 14));
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, this.room, this.height);
    pen.clip();
    this.ranges.forEach((range, row) => this.drawRow(pen, range, row));
    if (this.at >= 0) this.drawBox(pen, this.at, ink);
    pen.restore();
  }

  drawAxis(pen, ink, faint) {
    const span = this.high - this.low, step = tickStep(span, this.room);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    pen.textAlign = "center";
    pen.lineWidth = 1;
    for (let tick = Math.ceil(this.low / step); tick * step <= this.high; tick++) {
      const x = Math.round(this.xAt(tick * step)) + 0.5;
      pen.strokeStyle = faint;
      pen.globalAlpha = 0.35;
      pen.beginPath();
      pen.moveTo(x, TOP - 4);
      pen.lineTo(x, this.height);
      pen.stroke();
      pen.globalAlpha = 1;
      pen.fillStyle = ink;
      pen.fillText((tick * step).toFixed(digits), x, TOP - 9);
    }
    pen.textAlign = "right";
    pen.fillStyle = ink;
    pen.fillText("ms", LEFT - 8, TOP - 9);
  }

  xAt(time) { return LEFT + ((time - this.low) / (this.high - this.low)) * this.room; }

  drawRow(pen, range, row) {
    const y = TOP + ROW * row + 2, colours = this.names.colours;
    let drawn = -1; // right edge of what is there already
    for (let i = firstEndingAfter(this.end, range, this.low); i < range[1]; i++) {
      if (this.start[i] > this.high) break;
      const left = this.xAt(this.start[i]), right = Math.max(this.xAt(this.end[i]), left + 1);
      if (right <= drawn) continue;
      pen.fillStyle = colours[this.colour[i]].colour;
      pen.fillRect(left, y, Math.max(right - left - (right - left > 4 ? 0.5 : 0), 1), ROW - 4);
      drawn = Math.ceil(left + 0.5);
    }
  }

  drawBox(pen, at, ink) {
    const left = this.xAt(this.start[at]), right = this.xAt(this.end[at]);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(left - 1, TOP + ROW * this.row[at] + 1, Math.max(right - left, 1) + 2, ROW - 2);
  }
}

export default {
  render({ model, el }) {
    const timeline = new Timeline(model, el);
    return () => timeline.close();
  },
};
