// node drive.mjs CHROMIUM URL FLAGS CLIP…: gives each clip to the page at URL, in a headless Chromium with FLAGS (by
// spaces), and prints what the page shows as one JSON object. The page's log goes to stderr.
import { createRequire } from "node:module";
import { join } from "node:path";

const [executablePath, url, flags, ...clips] = process.argv.slice(2);
const { chromium } = createRequire(join(process.cwd(), "index.js"))("playwright-core");
const args = ["--no-sandbox", ...flags.split(" ").filter(Boolean)];
const browser = await chromium.launch({ executablePath, args });
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(300_000);
  page.on("console", (message) => console.error(message.text()));
  const failed = new Promise((_, reject) => page.on("pageerror", reject));
  const requests = [];
  page.on("request", (request) => requests.push(request.url()));
  const idle = () => Promise.race([failed, page.waitForFunction(() => !document.getElementById("audio").disabled)]);
  await page.goto(url);
  await idle();
  const texts = [];
  for (const clip of clips) {
    await page.setInputFiles("#audio", clip);
    await idle();
    texts.push(await page.evaluate(() => document.getElementById("text").value));
    console.error(texts.at(-1));
  }
  const adapter = await page.evaluate(async () => {
    const found = await navigator.gpu?.requestAdapter();
    return found ? { name: `${found.info.vendor} ${found.info.architecture}`, features: [...found.features] } : null;
  });
  console.log(JSON.stringify({ texts, adapter, requests }));
} finally {
  await browser.close();
}
