"use strict";
(() => {
  const takes = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const slider = by("step"), play = by("play"), where = by("where"), cut = by("cut");
  const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const state = { at: 0, by: "steps", tokens: "now", frame: 0 };

  // What a generation was, worked out once: its stages' tokens, its costs, where its tokens became more.
  for (const take of takes) {
    const [rows, columns] = take.grid.slice(-2);
    Object.assign(take, { rows, columns, all: take.grid.reduce((a, b) => a * b, 1) });
    for (const stage of take.stages) {
      if (stage.ran !== undefined) {
        const bytes = Uint8Array.from(atob(stage.ran), (c) => c.charCodeAt(0));
        stage.active = Uint8Array.from({ length: take.all }, (_, k) => (bytes[k >> 3] >> (k & 7)) & 1);
      }
    }
    take.heat = heatOf(take);
  }

  /** Returns for each step the share of the steps so far in which each token ran. */
  function heatOf(take) {
    const sum = new Float32Array(take.all);
    return take.steps.map((step, index) => {
      const stage = take.stages[step.stage], weight = 1 / (stage.factor * stage.factor);
      for (let k = 0; k < take.all; k++) sum[k] += stage.active ? stage.active[k] : weight;
      return sum.map((value) => value / (index + 1));
    });
  }

  const grows = (take, k) => k > 0 && take.steps[k].tokens > take.steps[k - 1].tokens;

  // Where the slider can stand: by steps, at a share of them; by cost, at the end of any step of any generation.
  const most = Math.max(...takes.map((take) => take.steps.length));
  const costs = [0, ...new Set(takes.flatMap((take) => take.steps.map((step) => step.cost)))].sort((a, b) => a - b);
  const last = () => (state.by === "cost" ? costs.length - 1 : most);

  /** Returns the step of a generation to show: -1 before any is done, the number of steps for the finished picture. */
  function placeOf(take) {
    const count = take.steps.length;
    if (state.by === "cost") {
      const spent = costs[state.at] + 1e-6;
      const done = take.steps.filter((step) => step.cost <= spent).length;
      return done === count ? count : done - 1;
    }
    return count === most ? state.at : Math.min(count, Math.floor((state.at * count) / most));
  }

  // Pictures are decoded once, in the background; what is shown is drawn again when one arrives.
  const pictures = new Map();
  let waits = 0;
  function pictureOf(uri) {
    if (!pictures.has(uri)) {
      const image = new Image();
      pictures.set(uri, image);
      waits += 1;
      image.onload = () => { waits -= 1; draw(); };
      image.onerror = () => { waits -= 1; console.error("a picture of the report cannot be read"); };
      image.src = uri;
    }
    const image = pictures.get(uri);
    return image.complete && image.naturalWidth ? image : null;
  }

  /** Draws one frame of a strip into a canvas, after making the canvas as large; returns its context. */
  function put(canvas, uri, take, alpha = 1, scale = 1) {
    const image = pictureOf(uri);
    if (image === null) return null;
    const height = image.naturalHeight / take.frames;
    const size = [Math.round(image.naturalWidth * scale), Math.round(height * scale)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, ...size);
    context.globalAlpha = alpha;
    const frame = Math.min(state.frame, take.frames - 1);
    context.drawImage(image, 0, frame * height, image.naturalWidth, height, 0, 0, ...size);
    context.globalAlpha = 1;
    return context;
  }

  const cleanOf = (take, place) => (place < take.steps.length ? take.steps[Math.max(0, place)].clean : take.final);
  const noisyOf = (take, place) => (place < take.steps.length ? take.steps[Math.max(0, place)].noisy : take.final);

  /** Returns the first token of the frame that is shown: a video's tokens stand frame after frame. */
  function firstToken(take) {
    if (take.grid.length < 3) return 0;
    const frames = take.grid[0];
    const shown = take.frames > 1 ? Math.round((Math.min(state.frame, take.frames - 1) * (frames - 1)) / (take.frames - 1)) : 0;
    return shown * take.rows * take.columns;
  }

  function drawTokens(canvas, take, place) {
    const step = take.steps[Math.min(place, take.steps.length - 1)];
    if (state.tokens === "heat") return drawHeat(canvas, take, place);
    const stage = take.stages[step.stage];
    const enlarged = Math.max(1, Math.round(512 / take.size[1]));
    const context = put(canvas, cleanOf(take, place), take, stage.active ? 0.22 : 1, enlarged);
    if (context === null) return;
    if (stage.kind === "pooled") drawBlocks(context, take, stage.factor);
    if (stage.active) drawActive(context, take, place, stage);
    drawGrid(context, take, stage.kind === "pooled" ? stage.factor : 1);
  }

  /** Draws the picture as the network saw it, f times smaller: blocks of f x f pixels. */
  function drawBlocks(context, take, factor) {
    const { width, height } = context.canvas;
    const small = document.createElement("canvas");
    const unit = factor * Math.max(1, Math.round(width / take.size[1]));
    [small.width, small.height] = [Math.max(1, Math.round(width / unit)), Math.max(1, Math.round(height / unit))];
    const pen = small.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(context.canvas, 0, 0, small.width, small.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, width, height);
    context.imageSmoothingEnabled = true;
  }

  function cells(context, take, paint) {
    const { width, height } = context.canvas, first = firstToken(take);
    const w = width / take.columns, h = height / take.rows;
    for (let row = 0; row < take.rows; row++) {
      for (let column = 0; column < take.columns; column++) {
        paint(first + row * take.columns + column, column * w, row * h, w, h);
      }
    }
  }

  /** Draws the tokens that ran in full, with an outline around those that did not run in the step before. */
  function drawActive(context, take, place, stage) {
    const image = pictureOf(cleanOf(take, place));
    if (image === null) return;
    const { width, height } = context.canvas, tall = image.naturalHeight / take.frames;
    const top = Math.min(state.frame, take.frames - 1) * tall;
    const x = image.naturalWidth / width, y = tall / height;
    const before = place > 0 && place < take.steps.length && grows(take, place) ? take.stages[take.steps[place - 1].stage].active : null;
    cells(context, take, (token, left, up, w, h) => {
      if (stage.active[token]) context.drawImage(image, left * x, top + up * y, w * x, h * y, left, up, w, h);
    });
    if (!before) return;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--pooled");
    context.lineWidth = Math.max(1, width / take.columns / 8);
    const inset = context.lineWidth / 2;
    cells(context, take, (token, left, up, w, h) => {
      if (stage.active[token] && !before[token]) context.strokeRect(left + inset, up + inset, w - 2 * inset, h - 2 * inset);
    });
  }

  function drawGrid(context, take, factor) {
    const { width, height } = context.canvas;
    if ((factor * width) / take.columns < 6) return;
    context.beginPath();
    for (let column = factor; column < take.columns; column += factor) {
      const x = Math.round((column * width) / take.columns) + 0.5;
      context.moveTo(x, 0);
      context.lineTo(x, height);
    }
    for (let row = factor; row < take.rows; row += factor) {
      const y = Math.round((row * height) / take.rows) + 0.5;
      context.moveTo(0, y);
      context.lineTo(width, y);
    }
    context.strokeStyle = "rgb(255 255 255 / .35)";
    context.lineWidth = Math.max(1, width / (context.canvas.clientWidth || width)); // one pixel of the screen
    context.stroke();
  }

  function heatColour(share) {
    const place = Math.min(0.9999, Math.max(0, share)) * (HEAT.length - 1), low = Math.floor(place), part = place - low;
    return HEAT[low].map((value, k) => Math.round(value + part * (HEAT[low + 1][k] - value)));
  }

  function drawHeat(canvas, take, place) {
    const context = put(canvas, cleanOf(take, place), take, 0.6, Math.max(1, Math.round(512 / take.size[1])));
    if (context === null) return;
    const heat = take.heat[Math.min(place, take.steps.length - 1)];
    cells(context, take, (token, left, up, w, h) => {
      context.fillStyle = `rgb(${heatColour(heat[token]).join(" ")} / .62)`;
      context.fillRect(left, up, w, h);
    });
  }

  const number = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(2).replace(/\.?0+$/, "") || "0");

  function shownIn(stage, take) {
    if (stage.kind === "dense") return `all ${take.all} tokens`;
    if (stage.kind === "subset") return `${stage.tokens} of ${take.all} tokens`;
    const size = { 2: "half the size", 4: "a quarter of the size" }[stage.factor] || `1/${stage.factor} of the size`;
    return `${stage.tokens} tokens, a picture of ${size}`;
  }

  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function drawCard(card, take) {
    const place = placeOf(take), count = take.steps.length;
    const step = take.steps[Math.min(Math.max(place, 0), count - 1)];
    const stage = take.stages[step.stage];
    const [noisy, clean, ran] = card.querySelectorAll("canvas");
    const captions = card.querySelectorAll("figcaption span");
    put(noisy, noisyOf(take, place), take);
    if (place < 0) {
      for (const canvas of [clean, ran]) {
        put(canvas, take.steps[0].clean, take, 0);
      }
    } else {
      put(clean, cleanOf(take, place), take);
      drawTokens(ran, take, place);
    }
    const isDone = place === count, spent = place < 0 ? 0 : step.cost;
    const cost = `cost ${number(spent)} of ${number(take.cost)} dense steps`;
    write(card.querySelector(".now"), place < 0 ? `before the first step · ${cost}` : isDone ? `finished, ${count} steps · ${cost}` : `step ${place + 1} of ${count} · stage ${step.stage + 1} of ${take.stages.length} · ${cost}`);
    write(captions[0], isDone ? "finished: no noise left" : `noise level ${step.level.toFixed(3)}${place < 0 ? "" : ` → ${step.next.toFixed(3)}`}`);
    write(captions[1], place < 0 ? "nothing yet" : isDone ? "finished" : `from this step, ${number(step.ms)} ms`);
    const grew = !isDone && place > 0 && grows(take, place) ? `, more than the ${take.steps[place - 1].tokens} before` : "";
    const heat = `share of the ${Math.min(place + 1, count)} steps so far, 0 violet to all yellow`;
    write(captions[2], place < 0 ? "none yet" : state.tokens === "heat" ? heat : `${shownIn(stage, take)}${isDone ? " in the last step" : grew}`);
    noisy.setAttribute("aria-label", `${take.name}: noisy state`);
    clean.setAttribute("aria-label", `${take.name}: predicted picture`);
    ran.setAttribute("aria-label", `${take.name}: ${captions[2].textContent}`);
    [...card.querySelector(".strip").children].forEach((bar, k) => {
      bar.classList.toggle("done", k < place || isDone);
      bar.classList.toggle("here", k === place);
    });
    card.dataset.place = place;
  }

  function drawPair() {
    const pair = by("pair");
    if (pair === null) return;
    const [left, right] = [takes[by("left").value], takes[by("right").value]];
    put(pair.querySelector(".under"), cleanOf(right, placeOf(right)), right);
    put(pair.querySelector(".over"), cleanOf(left, placeOf(left)), left);
    write(pair.querySelector(".tag.left"), left.name);
    write(pair.querySelector(".tag.right"), right.name);
    pair.querySelector(".under").setAttribute("aria-label", right.name);
    pair.querySelector(".over").setAttribute("aria-label", left.name);
    pair.style.setProperty("--cut", `${cut.value}%`);
  }

  function draw() {
    slider.max = last();
    slider.value = state.at;
    const words = state.by === "cost" ? `cost ${number(costs[state.at])} dense steps` : state.at === most ? "finished" : takes.length > 1 ? `${Math.round((100 * state.at) / most)} % of the steps` : `step ${state.at + 1} of ${most}`;
    write(where, words);
    slider.setAttribute("aria-valuetext", words);
    document.querySelectorAll("[data-take]").forEach((card) => drawCard(card, takes[card.dataset.take]));
    drawPair();
    document.body.dataset.ready = waits === 0;
  }

  function drawTicks() {
    const marks = new Set();
    for (const take of takes) {
      take.steps.forEach((step, k) => {
        if (!grows(take, k)) return;
        marks.add(state.by === "cost" ? costs.indexOf(step.cost) : Math.ceil((k * most) / take.steps.length));
      });
    }
    by("ticks").replaceChildren(...[...marks].map((place) => {
      const mark = document.createElement("i");
      mark.textContent = "▲";
      mark.style.left = `${(100 * place) / last()}%`;
      return mark;
    }));
  }

  function drawStrips() {
    document.querySelectorAll("[data-take]").forEach((card) => {
      const take = takes[card.dataset.take], count = take.steps.length;
      card.querySelector(".strip").replaceChildren(...take.steps.map((step, k) => {
        const bar = document.createElement("i"), stage = take.stages[step.stage];
        bar.className = stage.kind;
        bar.style.setProperty("--share", `${(100 * step.tokens) / take.all}%`);
        bar.title = `step ${k + 1}: ${shownIn(stage, take)}, noise level ${step.level.toFixed(3)}`;
        if (grows(take, k)) {
          bar.classList.add("grew");
          bar.classList.toggle("edge", k > 0.85 * count);
          bar.dataset.grew = `${take.steps[k - 1].tokens} → ${step.tokens} tokens`;
        }
        bar.onclick = () => { stop(); goTo(state.by === "cost" ? costs.indexOf(step.cost) : Math.ceil((k * most) / count)); };
        return bar;
      }));
    });
  }

  function goTo(place) {
    state.at = Math.min(last(), Math.max(0, Math.round(place)));
    draw();
    remember();
  }

  function setBy(value) {
    const share = state.at / last();
    state.by = value;
    state.at = Math.round(share * last());
    drawTicks();
    goTo(state.at);
  }

  // The address holds what is shown, so that a link to a step can be passed on.
  function remember() {
    if (timer !== null) return;
    const words = new URLSearchParams({ at: state.at, by: state.by, tokens: state.tokens });
    if (cut !== null) for (const id of ["left", "right", "cut"]) words.set(id, by(id).value);
    try {
      history.replaceState(null, "", `#${words}`);
    } catch {
      // Inside another page there is no address to keep.
    }
  }

  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    for (const name of ["by", "tokens"]) {
      const input = document.querySelector(`input[name="${name}"][value="${CSS.escape(words.get(name) || "")}"]`);
      if (input !== null) { input.checked = true; state[name] = input.value; }
    }
    if (cut !== null) {
      for (const id of ["left", "right"]) if (takes[words.get(id)] !== undefined && words.has(id)) by(id).value = words.get(id);
      if (words.has("cut")) cut.value = words.get("cut");
    }
    const at = Number(words.get("at"));
    state.at = words.has("at") && Number.isInteger(at) ? Math.min(last(), Math.max(0, at)) : Math.floor(0.4 * last());
  }

  let timer = null;
  function stop() {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    play.setAttribute("aria-pressed", "false");
    write(play.querySelector(".sr"), "Play");
    remember();
  }

  function start() {
    if (state.at === last()) goTo(0);
    play.setAttribute("aria-pressed", "true");
    write(play.querySelector(".sr"), "Pause");
    timer = setInterval(() => { goTo(state.at + 1); if (state.at === last()) stop(); }, Math.min(450, Math.max(90, 7000 / last())));
  }

  const toggle = () => (timer === null ? start() : stop());
  play.onclick = toggle;
  slider.oninput = () => { stop(); goTo(Number(slider.value)); };
  for (const input of document.querySelectorAll('input[name="by"]')) input.onchange = () => setBy(input.value);
  for (const input of document.querySelectorAll('input[name="tokens"]')) input.onchange = () => { state.tokens = input.value; draw(); remember(); };
  if (cut !== null) {
    cut.oninput = () => { drawPair(); remember(); };
    for (const id of ["left", "right"]) by(id).onchange = () => { drawPair(); remember(); };
  }

  function choose(name) {
    const inputs = [...document.querySelectorAll(`input[name="${name}"]`)];
    const next = inputs[(inputs.findIndex((input) => input.checked) + 1) % inputs.length];
    if (next !== undefined) next.click();
  }

  addEventListener("keydown", (event) => {
    const isTyped = event.target.matches("select, #cut, input[type=radio]");
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key in moves && !isTyped) {
      stop();
      goTo(Math.min(last(), Math.max(0, state.at + moves[event.key])));
    } else if (event.key === " " && !event.target.matches("select, button, summary")) {
      toggle();
    } else if (event.key === "t") {
      choose("tokens");
    } else if (event.key === "c") {
      choose("by");
    } else {
      return;
    }
    event.preventDefault();
  });

  // Videos play their frames over and over, unless the reader wants less motion.
  const frames = by("frames");
  if (frames !== null) {
    const longest = Math.max(...takes.map((take) => take.frames));
    const run = (on) => frames.setAttribute("aria-pressed", on);
    run(!matchMedia("(prefers-reduced-motion: reduce)").matches);
    frames.onclick = () => run(frames.getAttribute("aria-pressed") !== "true");
    setInterval(() => {
      if (frames.getAttribute("aria-pressed") !== "true") return;
      state.frame = (state.frame + 1) % longest;
      draw();
    }, 140);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("hashchange", () => { recall(); drawTicks(); draw(); });
  recall();
  drawStrips();
  drawTicks();
  for (const take of takes) {
    for (const uri of [take.final, ...take.steps.flatMap((step) => [step.noisy, step.clean])]) pictureOf(uri);
  }
  draw();
})();
