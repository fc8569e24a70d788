
// Shows a cell's title at once and on several lines; without this script the browser shows it after a delay.
(() => {
  const tip = document.getElementById("tip");
  const place = (event) => {
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 16;
    const fits = below + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(left, 8) + "px";
    tip.style.top = (fits ? below : Math.max(event.clientY - tip.offsetHeight - 10, 8)) + "px";
  };
  for (const cell of document.querySelectorAll("g.cell")) {
    const title = cell.querySelector("title");
    const text = title.textContent;
    title.remove();
    cell.addEventListener("pointermove", (event) => {
      tip.textContent = text;
      tip.hidden = false;
      place(event);
    });
    cell.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
})();
