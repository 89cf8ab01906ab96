(() => {
  "use strict";
  try {
    const kept = localStorage.getItem("actsparse-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // A browser that keeps nothing for files follows the system.
  }
  document.documentElement.classList.add("scripted");
})();
