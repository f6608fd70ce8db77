"use strict";

// Draws the curves of one or several runs as SVG, and shows the values under the pointer.
//
// The runs stand in the page as JSON (`run/charts.py` writes it): columns of numbers, null where there is none. A page
// that is served (`report --watch`) says so in `data-live`, and asks for what has been added every two seconds. Nothing
// else is loaded. Names and sentences come from other people's files: they enter the page as text, never as markup.

(() => {
  const PANELS = [
    { title: "Loss", lines: [{ key: "loss" }] },
    { title: "Reward accuracy", lines: [{ key: "rewards/accuracies" }], guide: 0.5, note: "coin toss", share: true },
    { title: "Reward margin", lines: [{ key: "rewards/margins" }], guide: "target_margin", note: "target margin" },
    { title: "Rewards", lines: pairOf("rewards") },
    { title: "Log-probs", lines: pairOf("logps") },
    { title: "Gradient norm", lines: [{ key: "grad_norm" }] },
    { title: "Learning rate", lines: [{ key: "learning_rate" }], exact: true },
    { title: "Tokens of an answer", lines: [{ key: "answers/length" }] },
  ];
  const MARGIN = { left: 52, right: 12, top: 8, bottom: 24 };
  const HEIGHT = 210;
  const SMOOTH_ABOVE = 60; // points; more are drawn faint behind their running mean
  const SECONDS_BETWEEN_QUESTIONS = 2;

  const data = JSON.parse(document.getElementById("runs").textContent);
  const runs = data.runs;
  const several = () => runs.length > 1;
  let pointed = null; // the step under the pointer, the same in all panels

  function pairOf(name) {
    return ["chosen", "rejected"].map((answer) => ({ key: `${name}/${answer}`, answer }));
  }

  // Of several runs chosen and rejected have a panel each: there the colour says which run it is.
  function panelsOfAnswers(panel) {
    if (panel.lines.length === 1) return [panel];
    return panel.lines.map(({ key, answer }) => ({ ...panel, title: `${panel.title}, ${answer}`, lines: [{ key }] }));
  }

  // --- elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    return filled(made, attributes, children);
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    return filled(made, attributes, children);
  }

  function filled(made, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // --- numbers

  function shown(value, panel) {
    if (panel.share) return `${(100 * value).toFixed(1)}%`;
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(2);
    return Number(value.toPrecision(4)).toString();
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) {
      found.push(Number(tick.toPrecision(12)));
    }
    return found;
  }

  function pointsOf(columns, key) {
    const values = columns[key] || [];
    const points = [];
    for (let i = 0; i < values.length; i++) if (values[i] !== null) points.push([columns.step[i], values[i]]);
    return points;
  }

  // Averages each value with its neighbours: a fortieth of the run on either side, fewer at the ends.
  function runningMean(points) {
    const half = Math.max(2, Math.floor(points.length / 40));
    const sums = [0];
    for (const [, value] of points) sums.push(sums[sums.length - 1] + value);
    return points.map(([step], i) => {
      const from = Math.max(i - half, 0);
      const to = Math.min(i + half + 1, points.length);
      return [step, (sums[to] - sums[from]) / (to - from)];
    });
  }

  // Of more points than the panel has pixels, the lowest and the highest of each pixel: spikes stay.
  function thinned(points, pixels) {
    const size = Math.ceil((2 * points.length) / pixels);
    if (size <= 2) return points;
    const kept = [];
    for (let i = 0; i < points.length; i += size) {
      const part = points.slice(i, i + size);
      const sorted = [...part].sort((a, b) => a[1] - b[1]);
      kept.push(...[sorted[0], sorted[sorted.length - 1]].sort((a, b) => a[0] - b[0]));
    }
    return kept;
  }

  function nearest(points, step) {
    if (!points.length) return null;
    let low = 0;
    let high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1;
      else high = middle;
    }
    const before = points[Math.max(low - 1, 0)];
    return Math.abs(before[0] - step) <= Math.abs(points[low][0] - step) ? before : points[low];
  }

  // --- one panel

  function colorOf(line, number, evaluated) {
    if (several()) return `var(--run-${number % 6})`;
    if (line.answer) return `var(--${line.answer})`;
    return evaluated ? "var(--evaluation)" : "var(--training)";
  }

  // All curves of a panel: the points of training and of evaluations, of each run and line.
  function curvesOf(panel) {
    return runs.flatMap((run, number) =>
      panel.lines.map((line) => ({
        run,
        line,
        number,
        train: pointsOf(run.train, line.key),
        evals: pointsOf(run.eval, line.key),
      })),
    );
  }

  function guideOf(panel) {
    if (typeof panel.guide !== "string") return panel.guide;
    return several() ? undefined : (runs[0][panel.guide] ?? undefined);
  }

  // The first and the last step of all runs: the panels have one axis.
  function stepRange() {
    const columns = runs.flatMap((run) => [run.train.step || [], run.eval.step || []]).filter((steps) => steps.length);
    const first = Math.min(...columns.map((steps) => steps[0]));
    return [first, Math.max(...columns.map((steps) => steps[steps.length - 1]), first + 1)];
  }

  function rangeOf(panel, drawn) {
    const values = drawn.flatMap(({ points }) => points.map(([, value]) => value));
    const guide = guideOf(panel);
    if (guide !== undefined) values.push(guide);
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
    const pad = 0.06 * (high - low);
    return panel.share ? [Math.max(0, low - pad), Math.min(1.01, high + pad)] : [low - pad, high + pad];
  }

  function draw(panel, chart) {
    const curves = curvesOf(panel);
    const empty = curves.every(({ train, evals }) => !train.length && !evals.length);
    chart.card.hidden = empty;
    if (empty) return;
    const width = chart.plot.clientWidth || 360;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const drawn = curves.flatMap((curve) => [
      { curve, points: thinned(curve.train, inner.width), evaluated: false },
      { curve, points: curve.evals, evaluated: true },
    ]);
    const [first, last] = stepRange();
    const [low, high] = rangeOf(panel, drawn);
    const x = (step) => MARGIN.left + (inner.width * (step - first)) / (last - first);
    const y = (value) => MARGIN.top + (inner.height * (high - value)) / (high - low);
    const corner = ([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    const path = (points) => points.map(corner).join("");

    const picture = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": `${panel.title} over the steps` });
    for (const tick of ticks(low, high, 4)) {
      picture.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }),
        svg("text", { class: "tick", x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, axis(tick, panel)),
      );
    }
    for (const tick of ticks(first, last, Math.max(2, Math.floor(inner.width / 80)))) {
      if (!Number.isInteger(tick)) continue;
      const below = { class: "tick", x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" };
      picture.append(svg("text", below, tick.toString()));
    }
    const guide = guideOf(panel);
    if (guide !== undefined) {
      picture.append(
        svg("line", { class: "guide", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(guide), y2: y(guide) }),
        svg("text", { class: "tick", x: width - MARGIN.right, y: y(guide) - 4, "text-anchor": "end" }, panel.note),
      );
    }
    for (const { curve, points, evaluated } of drawn) {
      if (!points.length) continue;
      const stroke = colorOf(curve.line, curve.number, evaluated);
      if (evaluated) {
        picture.append(svg("path", { class: "line evaluated", d: path(points), stroke }));
        for (const [step, value] of points) {
          picture.append(svg("circle", { class: "point", cx: x(step), cy: y(value), r: 3.5, fill: stroke }));
        }
      } else if (curve.train.length > SMOOTH_ABOVE && !panel.exact) {
        picture.append(svg("path", { class: "line raw", d: path(points), stroke }));
        const mean = thinned(runningMean(curve.train), inner.width);
        picture.append(svg("path", { class: "line", d: path(mean), stroke }));
      } else {
        picture.append(svg("path", { class: "line", d: path(points), stroke }));
      }
    }
    const cross = svg("line", { class: "cross", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    picture.append(cross);
    picture.addEventListener("pointermove", (event) => {
      const place = (event.offsetX - MARGIN.left) / inner.width;
      point(first + Math.max(0, Math.min(1, place)) * (last - first));
    });
    picture.addEventListener("pointerleave", () => point(null));
    chart.plot.replaceChildren(picture);
    chart.read = () => {
      read(panel, chart, curves);
      const visible = pointed !== null && pointed >= first && pointed <= last;
      cross.setAttribute("visibility", visible ? "visible" : "hidden");
      if (visible) for (const end of ["x1", "x2"]) cross.setAttribute(end, x(pointed));
    };
    chart.read();
  }

  function axis(tick, panel) {
    if (panel.share) return `${Math.round(100 * tick)}%`;
    return tick !== 0 && (Math.abs(tick) < 1e-3 || Math.abs(tick) >= 1e5) ? tick.toExponential(0) : tick.toString();
  }

  // Writes the values at the step under the pointer, or else the last ones; they are the legend too.
  function read(panel, chart, curves) {
    const at = (points) => (pointed === null ? points[points.length - 1] : nearest(points, pointed));
    const found = curves.map((curve) => ({ ...curve, trained: at(curve.train), evaluated: at(curve.evals) }));
    const entries = found.map(({ run, line, number, trained, evaluated }) => {
      const name = several() ? run.name : line.answer || "";
      const values = [];
      if (trained) {
        values.push(mark("bar", colorOf(line, number, false)), `${name || "training"} `, bold(trained, panel));
      }
      if (trained && evaluated) values.push(" ");
      if (evaluated) {
        const own = [trained ? "" : name, several() ? "" : "evaluation"].filter(Boolean).join(" ");
        values.push(mark("dot", colorOf(line, number, true)), own && `${own} `, bold(evaluated, panel));
      }
      return element("span", {}, ...values);
    });
    chart.values.replaceChildren(...entries);
    const { trained, evaluated } = found.find((curve) => curve.trained || curve.evaluated);
    const steps = [trained && `step ${trained[0]}`, evaluated && `eval ${evaluated[0]}`].filter(Boolean);
    chart.step.textContent = pointed === null ? "" : steps.join(" · ");
  }

  function mark(kind, color) {
    const sign = element("i", { class: kind });
    sign.style.background = color;
    return sign;
  }

  function bold([, value], panel) {
    return element("b", {}, shown(value, panel));
  }

  // --- the page

  const charts = (several() ? PANELS.flatMap(panelsOfAnswers) : PANELS).map((panel) => {
    const values = element("p", { class: "values" });
    const plot = element("div", { class: "plot" });
    const step = element("small");
    const title = element("h3", {}, panel.title, " ", step);
    const card = element("section", { class: "card chart" }, title, values, plot);
    return { panel, card, plot, values, step, read: () => {} };
  });
  const place = document.getElementById("charts");
  place.replaceChildren(...charts.map(({ card }) => card));
  document.body.classList.add("drawn"); // hides the picture, which stands in for the charts without JavaScript

  function point(step) {
    pointed = step;
    for (const chart of charts) chart.read();
  }

  function drawAll() {
    for (const chart of charts) {
      chart.card.hidden = false; // its width counts
      draw(chart.panel, chart);
    }
  }

  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth !== width) requestAnimationFrame(drawAll);
    width = place.clientWidth;
  }).observe(place);

  // --- a page that is served

  function extend(columns, more) {
    const before = (columns.step || []).length;
    for (const [key, values] of Object.entries(more)) {
      columns[key] ??= [];
      while (columns[key].length < before) columns[key].push(null); // earlier records had no such value
      columns[key].push(...values);
    }
  }

  function take(run, news) {
    if (news.generation !== run.generation) Object.assign(run, { train: {}, eval: {} });
    extend(run.train, news.train);
    extend(run.eval, news.eval);
    const { train, eval: evals, ...rest } = news;
    Object.assign(run, rest);
  }

  // `run/prose.py` cuts sentences into pieces: text, code, and links to our own pages.
  function shownPiece([kind, text, address]) {
    if (kind === "code") return element("code", {}, text);
    return kind === "link" ? element("a", { href: address, rel: "noreferrer" }, text) : text;
  }

  function tell() {
    for (const [number, run] of runs.entries()) {
      const row = document.querySelectorAll("#standing tbody tr")[number];
      for (const [cell, text] of run.standing.entries()) row.children[cell + 1].textContent = text;
    }
    const found = runs.flatMap((run) =>
      run.findings.map(({ step, said }) =>
        element(
          "p",
          {},
          element("b", {}, `${several() ? `${run.name}, step` : "Step"} ${step}.`),
          " ",
          ...said.map(shownPiece),
        ),
      ),
    );
    const findings = document.getElementById("findings");
    findings.hidden = !found.length;
    findings.replaceChildren(element("h2", {}, "What looks wrong"), ...found);
  }

  async function ask() {
    const state = document.getElementById("state");
    try {
      const since = runs.map((run) => [run.generation, (run.train.step || []).length, (run.eval.step || []).length]);
      const answer = await fetch(`data?since=${since.map((counts) => counts.join(":")).join(",")}`);
      const news = await answer.json();
      const isNew = (run, number) => run.train.step || run.eval.step || run.generation !== runs[number].generation;
      const added = news.runs.some(isNew);
      runs.forEach((run, number) => take(run, news.runs[number]));
      state.textContent = "";
      tell();
      if (added) drawAll();
    } catch {
      state.textContent = "The program that served this page has ended: what you see is its last answer.";
    }
    setTimeout(ask, 1000 * SECONDS_BETWEEN_QUESTIONS);
  }

  if (document.body.dataset.live !== undefined) ask();
})();
