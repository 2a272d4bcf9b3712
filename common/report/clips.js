"use strict";
// Clicking a word plays it, clicking a waveform plays from there; the word that is being played is outlined.
const clips = [...document.querySelectorAll("article")];

for (const clip of clips) {
  const audio = clip.querySelector("audio");
  const line = clip.querySelector("line");
  const wave = clip.querySelector("svg.wave");
  const status = clip.querySelector("output");
  const words = [...clip.querySelectorAll("button")];
  let end = Infinity; // seconds, where playing stops

  const show = () => {
    const x = audio.duration ? (audio.currentTime / audio.duration) * wave.viewBox.baseVal.width : 0;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    for (const word of words) {
      word.classList.toggle("now", word.dataset.start <= audio.currentTime && audio.currentTime < word.dataset.end);
    }
  };
  const follow = () => {
    if (audio.currentTime >= end) audio.pause();
    show();
    if (!audio.paused) requestAnimationFrame(follow);
  };
  const play = (from, to) => {
    end = to;
    audio.currentTime = from;
    audio.play();
  };

  audio.addEventListener("play", () => {
    for (const other of clips) if (other !== clip) other.querySelector("audio").pause();
    requestAnimationFrame(follow);
  });
  audio.addEventListener("pause", () => { end = Infinity; });
  audio.addEventListener("seeked", show);
  wave.addEventListener("click", (event) => {
    const box = wave.getBoundingClientRect();
    if (audio.duration) play(((event.clientX - box.left) / box.width) * audio.duration, Infinity);
  });
  for (const word of words) {
    word.addEventListener("click", () => {
      status.textContent = `${word.textContent}: ${word.title}`;
      const from = Number(word.dataset.start);
      play(from, Math.max(Number(word.dataset.end), from + 0.2)); // a word may have no length
    });
  }
}
