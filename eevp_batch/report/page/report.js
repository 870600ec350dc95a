"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // --- theme -----------------------------------------------------------------------------------
  const themeButton = byId("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const tellTheme = () => themeButton.setAttribute("aria-pressed", String(isDark()));
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    tellTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tellTheme);
  tellTheme();

  // --- tabs ------------------------------------------------------------------------------------
  const nav = document.querySelector("nav.tabs");
  const tabs = [...nav.querySelectorAll("[role=tab]")];
  const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));
  const open = (tab, wantsFocus) => {
    for (const other of tabs) {
      const isOpen = other === tab;
      other.setAttribute("aria-selected", String(isOpen));
      other.tabIndex = isOpen ? 0 : -1;
      panelOf(other).hidden = !isOpen;
    }
    if (wantsFocus) tab.focus();
    nav.scrollLeft = tab.offsetLeft - (nav.clientWidth - tab.offsetWidth) / 2;
    hideTip();
  };
  const tabOfHash = () => tabs.find((tab) => "#" + panelOf(tab).id === location.hash) || tabs[0];
  nav.hidden = false;
  document.body.classList.add("tabbed");
  for (const [place, tab] of tabs.entries()) {
    panelOf(tab).setAttribute("role", "tabpanel");
    tab.addEventListener("click", () => {
      open(tab);
      history.replaceState(null, "", "#" + panelOf(tab).id);
      if (nav.getBoundingClientRect().top <= 0) main.scrollIntoView();
    });
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      open(tabs[(steps[event.key] + tabs.length) % tabs.length], true);
    });
  }
  const main = document.querySelector("main");
  main.style.scrollMarginTop = "44px";
  addEventListener("hashchange", () => open(tabOfHash()));

  // --- what is told of a bar, a dot or a token --------------------------------------------------
  const tip = byId("tip");
  function hideTip() {
    tip.hidden = true;
  }
  function showTip(text, box) {
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(Math.max(8, box.x - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.y - tip.offsetHeight - 10;
    tip.style.left = left + "px";
    tip.style.top = (above > 8 ? above : box.y + 22) + "px";
  }
  const tipOf = (event) => {
    const target = event.target.closest && event.target.closest("[data-tip]");
    if (target) showTip(target.dataset.tip, { x: event.clientX, y: event.clientY });
    else hideTip();
  };
  document.addEventListener("pointermove", tipOf);
  document.addEventListener("pointerdown", tipOf);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  addEventListener("scroll", hideTip, { passive: true, capture: true });

  // --- samples ---------------------------------------------------------------------------------
  const data = JSON.parse(byId("samples-data").textContent);
  const browser = byId("browser");
  if (browser) {
    const pick = byId("pick"), text = byId("sample-text"), facts = byId("token-facts");
    let at = -1;
    const tokens = () => text.querySelectorAll("span");
    const shown = (piece) => piece.replace(/\n/g, "⏎").replace(/ /g, "␣") || "(part of a character)";
    const told = (sample, k) =>
      `left after layer ${data.layers[sample.exits[k]]}, confidence ${sample.confidences[k].toFixed(4)}`;

    const tellToken = (k) => {
      const sample = data.samples[pick.selectedIndex];
      facts.replaceChildren();
      for (const span of text.querySelectorAll(".at")) span.classList.remove("at");
      at = k;
      if (k < 0) {
        facts.textContent = "\u00a0";
        return;
      }
      const code = document.createElement("code");
      code.textContent = shown(sample.pieces[k]);
      facts.append(`Token ${k + 1} of ${sample.pieces.length} `, code, `: ${told(sample, k)}`);
      tokens()[k].classList.add("at");
    };

    const show = (place) => {
      const sample = data.samples[place];
      pick.selectedIndex = place;
      byId("sample-facts").textContent = sample.facts;
      byId("prompt-box").hidden = sample.prompt === null;
      byId("sample-prompt").textContent = sample.prompt || "";
      text.replaceChildren();
      if (sample.pieces) {
        for (const [k, piece] of sample.pieces.entries()) {
          const span = document.createElement("span");
          span.className = "x" + sample.exits[k];
          span.textContent = piece;
          span.dataset.tip = told(sample, k);
          text.append(span);
        }
      } else {
        text.textContent = sample.text || "(empty)";
      }
      tellToken(-1);
      hideTip();
    };

    for (const sample of data.samples) pick.add(new Option(sample.title));
    pick.addEventListener("change", () => show(pick.selectedIndex));
    const step = (by) => show((pick.selectedIndex + by + data.samples.length) % data.samples.length);
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    text.addEventListener("click", (event) => {
      const place = [...tokens()].indexOf(event.target);
      if (place >= 0) tellToken(place);
    });
    text.addEventListener("keydown", (event) => {
      const count = tokens().length;
      const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: count - 1 };
      if (!(event.key in steps) || !count) return;
      event.preventDefault();
      tellToken(Math.min(Math.max(steps[event.key], 0), count - 1));
      tokens()[at].scrollIntoView({ block: "nearest" });
    });
    browser.hidden = false;
    show(0);
  }
  open(tabOfHash());
})();
