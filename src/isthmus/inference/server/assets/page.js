"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const ORIGINS = {
    accepted: "drafted and accepted", corrected: "drawn by the edge's correction",
    bonus: "added by the edge after a whole draft", target: "the target alone",
    device: "the device alone",
  };
  const EXAMPLES = ["If the file", "The arguments are", "This function"];
  const messages = [];
  let about = null, running = null;

  // Numbers in three figures, with the exact one left to the reader's own arithmetic.
  const figures = (x) => {
    if (!Number.isFinite(x)) return "–";
    if (x === 0) return "0";
    const power = Math.floor(Math.log10(Math.abs(Number(x.toPrecision(3)))));
    return x.toFixed(Math.min(Math.max(2 - power, 0), 9));
  };
  const scaled = (x, unit, prefixes) => {
    if (!Number.isFinite(x)) return "–";
    for (const [factor, prefix] of prefixes) {
      if (Math.abs(x) >= factor) return `${figures(x / factor)} ${prefix}${unit}`;
    }
    return x === 0 ? `0 ${unit}` : `${figures(x / prefixes.at(-1)[0])} ${prefixes.at(-1)[1]}${unit}`;
  };
  const bytes = (x) => scaled(x, "B", [[1e6, "M"], [1e3, "k"], [1, ""]]);
  const joules = (x) => scaled(x, "J", [[1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"]]);
  const seconds = (x) => scaled(x, "s", [[1, ""], [1e-3, "m"], [1e-6, "µ"]]);
  const percent = (part, whole) => whole ? `${Math.round(100 * part / whole)} %` : "–";

  const element = (tag, name, text = "") => {
    const node = document.createElement(tag);
    node.className = name;
    node.textContent = text;
    return node;
  };

  // The token, where the server asks for one, stays in this tab.
  const headers = () => {
    const token = sessionStorage.getItem("isthmus-token");
    return {"Content-Type": "application/json", ...(token && {Authorization: `Bearer ${token}`})};
  };
  const askToken = () => new Promise((resolve) => {
    at("token").value = "";
    at("ask").addEventListener("close", () => {
      sessionStorage.setItem("isthmus-token", at("token").value.trim());
      resolve();
    }, {once: true});
    at("ask").showModal();
  });
  const call = async (path, options = {}) => {
    for (;;) {
      const answer = await fetch(path, {...options, headers: headers()});
      if (answer.status !== 401) return answer;
      await askToken();
    }
  };
  const problem = async (answer) => {
    try {
      return (await answer.json()).error.message;
    } catch {
      return `the server answered ${answer.status}`;
    }
  };

  // What came so far, drawn as one bar a round: as wide as its tokens, as high as the logarithm
  // of its bytes per token.
  const draw = (rounds) => {
    const svg = document.querySelector("#trace svg");
    const width = Math.max(64, rounds.reduce((sum, round) => sum + round.tokens, 0));
    const height = (count) => Math.min(Math.log10(1 + count) / 5, 1) * 46;
    svg.setAttribute("viewBox", `0 0 ${width} 100`);
    svg.replaceChildren();
    const shape = (tag, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      svg.append(node);
    };
    shape("line", {x1: 0, x2: width, y1: 50, y2: 50});
    let x = 0;
    for (const {tokens, up, down} of rounds) {
      const box = {x: x + 0.1 * Math.min(tokens, 1), width: tokens - 0.2 * Math.min(tokens, 1)};
      const [over, under] = [height(up / tokens), height(down / tokens)];
      shape("rect", {class: "u", ...box, y: 49 - over, height: over});
      shape("rect", {class: "d", ...box, y: 51, height: under});
      x += tokens;
    }
  };
  const show = (f) => {
    at("up").textContent = bytes(f.offers / f.tokens);
    at("down").textContent = bytes(f.verdicts / f.tokens);
    at("accepted").textContent = percent(f.accepted, f.judged);
    at("virtual").textContent = figures(f.tokens / f.seconds);
    at("real").textContent = figures(f.tokens / f.wall);
    at("joules").textContent = joules(f.device_joules + f.edge_joules);
  };
  const blank = () => {
    for (const id of ["up", "down", "accepted", "virtual", "real", "joules"]) at(id).textContent = "–";
    for (const count of document.querySelectorAll(".key b")) count.textContent = "0";
    draw([]);
  };

  const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 48;
  const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

  // One text: its element, the pieces that came and those that are shown.
  class Text {
    constructor(turn, told, paced) {
      Object.assign(this, {turn, told, paced, text: "", last: null, due: [], rounds: [], shown: 0});
      this.seen = {tokens: 0, offers: 0, verdicts: 0, rounds: 0};
      this.abort = new AbortController();
      this.begun = 0;
    }

    come(piece) {
      this.due.push(piece);
      if (!this.begun) this.begun = performance.now();
      this.tick();
    }

    tick() {
      clearTimeout(this.timer);
      const now = (performance.now() - this.begun) / 1000;
      const stay = atEnd();
      while (this.due.length && (!this.paced || this.due[0].t <= now)) this.one(this.due.shift());
      if (stay) toEnd();
      if (this.due.length) {
        const wait = Math.min(1000 * (this.due[0].t - now), 1e6);
        this.timer = setTimeout(() => this.tick(), Math.max(wait, 4));
      } else if (this.idle) {
        this.idle();
      }
    }

    one({spans, origin, figures: f}) {
      if (f.tokens > this.seen.tokens) {
        const count = document.querySelector(`.key[data-origin=${origin}] b`);
        count.textContent = Number(count.textContent) + 1;
      }
      for (const [text, by] of spans) {
        const word = text.trimStart();
        this.told.append(text.slice(0, text.length - word.length));
        if (word) {
          const span = element("span", by, word);
          span.title = ORIGINS[by];
          this.told.append(span);
        }
        this.text += text;
      }
      const step = {
        tokens: f.tokens - this.seen.tokens,
        up: f.offers - this.seen.offers, down: f.verdicts - this.seen.verdicts,
      };
      if (f.rounds > this.seen.rounds || !this.rounds.length) this.rounds.push(step);
      else for (const name in step) this.rounds.at(-1)[name] += step[name];
      this.seen = this.last = f;
      draw(this.rounds);
      show(f);
    }

    // Resolves when everything that came is shown.
    rest() {
      return new Promise((resolve) => {
        this.idle = resolve;
        this.tick();
      });
    }

    hurry() {
      this.paced = false;
      this.tick();
    }
  }

  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }

  const begin = (said) => {
    at("empty").hidden = true;
    blank();
    const turn = element("div", "turn");
    // A model that was taught to chat answers; any other goes on in the same paragraph.
    const told = element(about.chat ? "p" : "span", "told live");
    const first = element("p", "said", said);
    turn.append(first);
    (about.chat ? turn : first).append(told);
    at("log").append(turn);
    toEnd();
    return new Text(turn, told, at("pace").value === "link");
  };
  const button = (word) => {
    at("send").textContent = word;
    at("send").classList.toggle("stop", word !== "Send");
  };

  const send = async (said) => {
    messages.push({role: "user", content: said});
    const text = begin(said);
    text.placed = placed();
    running = text;
    button("Stop");
    const method = about.methods.find((one) => one.name === at("method").value);
    const asked = {
      messages, stream: true, temperature: Number(at("temperature").value),
      seed: Number(at("seed").value), max_tokens: Number(at("length").value),
      isthmus: {
        method: method.name, link: at("link").value, fit: true,
        settings: method.gamma === null ? {} : {gamma: Number(at("gamma").value)},
      },
    };
    let wrong = "";
    try {
      const answer = await call("/v1/chat/completions", {
        method: "POST", body: JSON.stringify(asked), signal: text.abort.signal,
      });
      if (!answer.ok) wrong = await problem(answer);
      else {
        for await (const event of events(answer.body)) {
          if (event.error) wrong = event.error.message;
          else if (event.isthmus?.figures) text.come(event.isthmus);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") wrong = "the server cannot be reached";
    }
    if (text.due.length) button("Show all");
    await text.rest();
    finish(text, asked, wrong);
  };

  const finish = (text, asked, wrong) => {
    text.told.classList.remove("live");
    const f = text.last;
    if (f) {
      messages.push({role: "assistant", content: text.text});
      const note = `${text.placed}, seed ${asked.seed}: ` +
        `${f.tokens} tokens in ${seconds(f.seconds)} virtual, ${seconds(f.wall)} real; ` +
        `${bytes(f.up)} up and ${bytes(f.down)} down in all`;
      text.turn.append(element("p", "note", note));
      at("status").textContent = `The text is done. ${note}`;
    } else {
      messages.pop();
    }
    if (wrong) {
      const line = element("p", "wrong", wrong);
      line.setAttribute("role", "alert");
      text.turn.append(line);
    }
    running = null;
    button("Send");
    toEnd();
  };

  const stop = () => {
    running?.abort.abort();
    running?.hurry();
  };

  const grow = () => {
    at("text").style.height = "auto";
    at("text").style.height = `${at("text").scrollHeight + 2}px`;
  };
  const placed = () => {
    const method = about.methods.find((one) => one.name === at("method").value);
    return method.edge ? `${method.name} over ${at("link").value}` : method.name;
  };
  const tell = () => {
    const method = about.methods.find((one) => one.name === at("method").value);
    const link = about.links.find((one) => one.name === at("link").value);
    at("method-told").textContent = method.told;
    at("link-told").textContent = link.told;
    at("gamma").disabled = method.gamma === null;
    at("link").disabled = !method.edge;
    at("chosen").textContent = placed();
  };

  at("say").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return stop();
    const said = at("text").value;
    if (!said.trim() || !about) return;
    if (!at("form").checkValidity()) {
      at("settings").open = true;
      return at("form").reportValidity();
    }
    at("text").value = "";
    grow();
    send(said);
  });
  at("text").addEventListener("input", grow);
  at("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) at("say").requestSubmit();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  at("form").addEventListener("input", tell);
  at("form").addEventListener("submit", (event) => event.preventDefault());
  at("clear").addEventListener("click", () => {
    stop();
    messages.length = 0;
    at("log").replaceChildren();
    at("empty").hidden = false;
    blank();
    at("text").focus();
  });
  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      for (const other of document.querySelectorAll(".key")) other.setAttribute("aria-pressed", "false");
      key.setAttribute("aria-pressed", String(on));
      if (on) at("log").dataset.only = key.dataset.origin;
      else delete at("log").dataset.only;
    });
  }

  const start = async () => {
    if (matchMedia("(max-width: 899px)").matches) at("settings").open = false;
    blank();
    const answer = await call("/isthmus/about");
    if (!answer.ok) {
      at("pair").textContent = await problem(answer);
      return;
    }
    about = await answer.json();
    document.title = `${about.model} – isthmus`;
    at("model").textContent = about.model;
    at("pair").textContent = about.draft
      ? `${about.draft} drafts on the device (${about.device}), ` +
        `${about.model} judges at the edge (${about.edge})`
      : `${about.model} decodes at the edge (${about.edge})`;
    for (const name of ["method", "link"]) {
      for (const one of about[`${name}s`]) at(name).append(new Option(one.name, one.name));
      at(name).value = about[name];
    }
    at("length").max = about.context;
    at("gamma").value = about.methods[0].gamma ?? at("gamma").value;
    for (const text of EXAMPLES) {
      const example = element("button", "", text);
      example.type = "button";
      example.addEventListener("click", () => running || send(text));
      at("examples").append(example);
    }
    tell();
    at("text").focus({preventScroll: true});
  };
  start();
})();
