const ENDS = {eos: "ended by itself", length: "cut by the budget", drift: "stopped at drift"};

function verdict(r) {
  if (r.correct === true || r.reward === 1) return "right";
  if (r.correct === false || r.reward === 0) return "wrong";
  return "unknown";
}

function textOf(r) { return r.ids.map(id => r.tokens[id] ?? `<${id}>`).join(""); }

function colour(kind, r, i) {
  let share;
  if (kind === "overlap" && !r.overlap) kind = "gap"; // a run that looks for no drift
  if (kind === "overlap") share = r.overlap && i < r.overlap.length ? r.overlap[i] : null;
  else if (kind === "weight") share = r.weight && i < r.weight.length ? r.weight[i] / Math.max(1, ...r.weight) : null;
  else share = i < r.teacher_logprobs.length ? Math.max(0, Math.min(1, 1 + (r.teacher_logprobs[i] - r.logprobs[i]) / 5)) : null;
  if (share === null || share === undefined) return "";
  return `hsl(${Math.round(120 * share)} 75% ${Math.round(92 - 14 * (1 - share))}%)`;
}

function tip(r, i) {
  const box = document.createDocumentFragment(), id = r.ids[i], read = i < r.teacher_logprobs.length;
  box.append(element("b", JSON.stringify(r.tokens[id] ?? "")), element("span", ` id ${id}, position ${i}`), element("br"));
  const says = [`student ${number(Math.exp(r.logprobs[i]))}`, read ? `teacher ${number(Math.exp(r.teacher_logprobs[i]))}` : "not read by the teacher"];
  if (r.overlap && i < r.overlap.length) says.push(`overlap ${number(r.overlap[i])}`);
  if (r.weight && i < r.weight.length) says.push(`prune weight ${number(r.weight[i])}`);
  if (r.drift.includes(i)) says.push("drift event");
  box.append(element("span", says.join(", ")));
  if (r.candidates && r.candidates[i] && r.candidates[i].length) {
    box.append(table(["candidate", "student", "teacher"], r.candidates[i].map((c, k) => [
      JSON.stringify(r.tokens[c] ?? ""), number(Math.exp(r.candidate_logprobs[i][k])), read && r.candidate_teacher[i] ? number(Math.exp(r.candidate_teacher[i][k])) : "\u2013"])));
  }
  return box;
}

function showResponse(r, kind) {
  const shown = document.getElementById("r-shown"), hint = document.getElementById("tip");
  shown.replaceChildren();
  const judged = verdict(r), facts = [`step ${r.step}`, ENDS[r.end_reason] ?? r.end_reason, `${r.length} tokens`, `${r.effective_length} effective`, `${r.events} drift events`];
  if (r.source) facts.push(`source ${r.source}`);
  if (r.teacher && r.teacher !== "teacher") facts.push(`teacher ${r.teacher}`);
  if (judged !== "unknown") facts.push(judged);
  shown.append(element("p", facts.join(" \u00b7 "), judged));
  shown.append(element("h3", "Prompt"), element("div", r.prompt, "text prompt"));
  if (r.answer !== null && r.answer !== undefined) shown.append(element("p", `Reference answer: ${r.answer}`));
  const title = element("h3", "Response"), scale = element("span", undefined, "scale");
  scale.style.background = "linear-gradient(90deg, hsl(0 75% 78%), hsl(60 75% 85%), hsl(120 75% 92%))";
  title.append(" ", scale); shown.append(title);
  const text = element("div", undefined, "text");
  text.id = "r-text";
  r.ids.forEach((id, i) => {
    if (i === r.effective_length && i < r.length && r.events > 0) text.append(element("span", "reliability spent", "spent"));
    const token = element("span", r.tokens[id] ?? `<${id}>`, "t" + (r.drift.includes(i) ? " event" : ""));
    token.dataset.i = i;
    token.style.background = colour(kind, r, i);
    text.append(token);
  });
  if (r.shown < r.length) text.append(element("p", `The first ${r.shown} of ${r.length} tokens.`, "none"));
  text.addEventListener("mouseover", event => {
    const i = event.target.dataset ? event.target.dataset.i : undefined;
    if (i === undefined) { hint.hidden = true; return; }
    hint.replaceChildren(tip(r, Number(i)));
    hint.hidden = false;
    const place = event.target.getBoundingClientRect();
    hint.style.left = `${Math.max(4, Math.min(place.left + window.scrollX, window.scrollX + document.documentElement.clientWidth - 370))}px`;
    hint.style.top = `${place.bottom + window.scrollY + 4}px`;
  });
  text.addEventListener("mouseleave", () => { hint.hidden = true; });
  shown.append(text);
}

function browse(runs) {
  const get = id => document.getElementById(id), list = get("r-list"), all = [];
  runs.forEach((run, r) => run.responses.forEach(response => all.push({run: r, response, text: (response.prompt + "\n" + textOf(response)).toLowerCase()})));
  get("r-run").append(...["any run", ...runs.map(run => run.name)].map((name, i) => { const o = element("option", name); o.value = i ? String(i - 1) : ""; return o; }));
  let chosen = null;
  const fill = () => {
    const want = {run: get("r-run").value, end: get("r-end").value, correct: get("r-correct").value, search: get("r-search").value.trim().toLowerCase()};
    const found = all.filter(({run, response, text}) => (want.run === "" || String(run) === want.run) && (!want.end || response.end_reason === want.end) && (!want.correct || verdict(response) === want.correct) && (!want.search || text.includes(want.search)));
    get("r-count").textContent = `${found.length} of ${all.length}`;
    list.replaceChildren(...found.map(one => {
      const item = element("li"), button = element("button", undefined, one === chosen ? "chosen" : "");
      button.append(element("span", `${runs.length > 1 ? runs[one.run].name + ", " : ""}step ${one.response.step}, ${one.response.length} tokens, ${ENDS[one.response.end_reason] ?? one.response.end_reason}`, verdict(one.response)), element("small", one.response.prompt.slice(-90)));
      button.addEventListener("click", () => { chosen = one; list.querySelectorAll(".chosen").forEach(b => b.classList.remove("chosen")); button.classList.add("chosen"); showResponse(one.response, get("r-colour").value); });
      item.append(button);
      return item;
    }));
    if (found.length && !found.includes(chosen)) { chosen = found[0]; list.querySelector("button").classList.add("chosen"); showResponse(chosen.response, get("r-colour").value); }
    if (!found.length) { chosen = null; get("r-shown").replaceChildren(element("p", all.length ? "No response is like that." : "No responses were recorded (train.record_responses).", "none")); }
  };
  for (const id of ["r-run", "r-end", "r-correct"]) get(id).addEventListener("change", fill);
  get("r-search").addEventListener("input", fill);
  get("r-colour").addEventListener("change", () => chosen && showResponse(chosen.response, get("r-colour").value));
  fill();
}
