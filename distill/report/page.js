for (const example of document.querySelectorAll(".example")) {
  const words = [...example.querySelectorAll("button")];
  const show = (word) => {
    example.style.setProperty("--i", word.dataset.map);
    example.querySelector(".shown").textContent = word.textContent;
    words.forEach((other) => other.setAttribute("aria-pressed", other.dataset.map === word.dataset.map));
  };
  words.forEach((word, place) => {
    for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, () => show(word));
    word.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) words[(place + step + words.length) % words.length].focus();
    });
  });
}
