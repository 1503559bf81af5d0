"use strict";
// Text of models and prompts is shown, never interpreted: elements get text nodes alone, and what would not be seen, or
// would turn the line around, is written out.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]|[\u{e0000}-\u{e007f}]/gu;

function visible(text) {
  return String(text).replace(HIDDEN, c => "\u27e8U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");
}

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = visible(text);
  if (kind) made.className = kind;
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(digits)).toString();
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "\u2013";
  const whole = Math.round(seconds), h = Math.floor(whole / 3600), m = Math.floor(whole % 3600 / 60), s = whole % 60;
  return h ? `${h} h ${String(m).padStart(2, "0")} min` : m ? `${m} min ${String(s).padStart(2, "0")} s` : `${number(seconds)} s`;
}

// rows: arrays of cells; a cell is text, a number, or an element
function table(head, rows) {
  const made = element("table"), top = element("tr");
  head.forEach(cell => top.append(element("th", cell)));
  made.append(element("thead")); made.lastChild.append(top); made.append(element("tbody"));
  for (const row of rows) {
    const line = element("tr");
    for (const cell of row) {
      const box = element("td", undefined, typeof cell === "number" ? "number" : "");
      if (cell instanceof Node) box.append(cell); else box.textContent = typeof cell === "number" ? number(cell, 4) : visible(cell ?? "\u2013");
      line.append(box);
    }
    made.lastChild.append(line);
  }
  return made;
}
