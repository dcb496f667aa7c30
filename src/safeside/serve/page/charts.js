// Pictures of one answer.  Height, position and words carry the meaning; colour only repeats it.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function drawn(name, attributes, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

const number = (value, digits = 2) => (value === null || value === undefined ? "not scored" : value.toFixed(digits));

// The riskiest guard of a token: its name and score; a guard without a score comes first.
function worst(risk) {
  const found = Object.entries(risk);
  return found.find(([, score]) => score === null) ?? found.sort((a, b) => b[1] - a[1])[0] ?? ["", 0];
}

export function strip(place, tokens, lines) {
  place.replaceChildren(
    ...tokens.map((token) => {
      const [guard, score] = worst(token.risk);
      const isOver = score === null || score >= (lines[guard] ?? Infinity);
      const told = Object.entries(token.risk).map(([name, value]) => `${name} ${number(value)}`).join(", ");
      const shown = token.text.replace(/\n/g, "\u23ce").replace(/^ /, "\u00b7") || "\u2205";
      const label = `${shown} \u2014 risk ${told || "not asked"}, strength ${number(token.strength)}`;
      const cell = element("span", { class: isOver ? "token over" : "token", role: "listitem", tabindex: "0", title: label, "aria-label": label });
      const bar = drawn("svg", { class: "risk", viewBox: "0 0 10 10", preserveAspectRatio: "none", "aria-hidden": "true" });
      const height = 10 * Math.min(1, Math.max(0.04, score ?? 1));
      bar.append(drawn("rect", { x: 0, y: 10 - height, width: 10, height, class: `level${Math.min(4, Math.floor((score ?? 1) * 5))}` }));
      cell.append(bar, element("span", { class: "word" }, shown));
      return cell;
    }),
  );
}

export function trace(place, tokens) {
  if (!tokens.length) return place.replaceChildren();
  const [width, height, left, gap] = [900, 104, 34, 8];
  const top = Math.max(1, ...tokens.map((token) => token.strength));
  const x = (index) => left + (index * (width - left - gap)) / tokens.length;
  const y = (value) => height - 16 - (value / top) * (height - 16 - gap);
  const told = tokens.map((token) => token.strength);
  const range = `${number(Math.min(...told))} to ${number(Math.max(...told))}`;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Strength from ${range} over ${tokens.length} tokens` });
  for (const value of [0, top / 2, top]) {
    picture.append(drawn("line", { x1: left, x2: width - gap, y1: y(value), y2: y(value), class: "grid" }));
    picture.append(drawn("text", { x: left - 6, y: y(value) + 4, class: "tick end" }, number(value, 1)));
  }
  const steps = told.map((value, index) => `${index ? "L" : "M"}${x(index)},${y(value)} L${x(index + 1)},${y(value)}`).join(" ");
  picture.append(drawn("path", { d: `${steps} L${x(told.length)},${y(0)} L${left},${y(0)} Z`, class: "area" }), drawn("path", { d: steps, class: "line" }));
  picture.append(drawn("text", { x: left, y: height - 2, class: "tick" }, "first token"));
  picture.append(drawn("text", { x: width - gap, y: height - 2, class: "tick end" }, `token ${tokens.length}`));
  return place.replaceChildren(picture);
}

export function verdicts(place, found) {
  if (!found.length) return place.replaceChildren(element("p", { class: "quiet" }, "No guard was asked."));
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["of", "guard", "label", "score", "", "threshold", "verdict"]) head.append(element("th", { scope: "col" }, name));
  const body = table.createTBody();
  for (const verdict of found) {
    const row = body.insertRow();
    if (verdict.flagged) row.className = "over";
    const meter = drawn("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    meter.append(
      drawn("rect", { x: 0, y: 2, width: 100, height: 6, class: "rail" }),
      drawn("rect", { x: 0, y: 2, width: 100 * (verdict.score ?? 1), height: 6, class: "fill" }),
      drawn("rect", { x: Math.min(99, 100 * verdict.threshold), y: 0, width: 1.5, height: 10, class: "mark" }),
    );
    const cells = [verdict.stage, verdict.guard, verdict.label, number(verdict.score, 3), meter, number(verdict.threshold, 3), verdict.flagged ? "\u2691 flagged" : "\u2713 below"];
    for (const cell of cells) row.insertCell().append(cell);
    if (verdict.reason) row.lastChild.append(element("span", { class: "quiet" }, ` (${verdict.reason})`));
  }
  return place.replaceChildren(table);
}
