// Shows a bar's title at once and on several lines, when it is pointed at or has the focus. Without this script the browser
// shows it after a delay, and screen readers read it all the same.
(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (text, x, top, bottom) => {
    tip.textContent = text;
    tip.hidden = false;
    const fits = bottom + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(Math.min(x, innerWidth - tip.offsetWidth - 8), 8) + "px";
    tip.style.top = (fits ? bottom : Math.max(top - tip.offsetHeight, 8)) + "px";
  };
  for (const cell of document.querySelectorAll("g.cell")) {
    const title = cell.querySelector("title");
    const text = title.textContent;
    title.remove();
    cell.setAttribute("aria-label", text);
    cell.addEventListener("pointermove", (event) => {
      show(text, event.clientX + 14, event.clientY - 10, event.clientY + 16);
    });
    cell.addEventListener("pointerleave", hide);
    cell.addEventListener("focus", () => {
      const box = cell.getBoundingClientRect();
      show(text, box.left, box.top - 6, box.bottom + 6);
    });
    cell.addEventListener("blur", hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();
