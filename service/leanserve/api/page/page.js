// The page at `/`: what the build has measured, what the service tells once a second, and what a visitor asks of it.

import { el, find, money, number, percent, say, times } from "./dom.js";
import { get, listen, onRefused, useKey } from "./service.js";
import { onTheme, startTheme } from "./theme.js";
import { Experiment } from "./experiment.js";
import { History } from "./history.js";
import { LatencyPlot } from "./latency.js";
import { Tradeoff } from "./tradeoff.js";
import { TryIt } from "./try_it.js";
import { VariantTable } from "./variants.js";
import { Waterfall } from "./waterfall.js";

const AGAIN_MS = 1000;
const COLOURS = 8;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Every variant of the report, or else of the service: its number and colour, the same wherever it is shown. */
function numbered(report, names) {
  const measured = new Map((report?.variants ?? []).map((variant) => [variant.name, variant]));
  const all = names.map((name, index) => ({ number: index + 1, ...measured.get(name), name, colour: (index % COLOURS) + 1 }));
  return new Map(all.map((variant) => [variant.name, variant]));
}

function showClaim(report) {
  if (!report) return;
  const { name, claim, rule, cautions } = report.headline;
  find("#claim").replaceChildren(...(name ? [el("strong", {}, name), ` ${claim}`] : [claim]));
  find("#rule").hidden = false;
  find("#rule > div").replaceChildren(el("p", {}, rule), ...cautions.map((text) => el("p", { class: "caution" }, text)));
}

function tiles(snapshot, report) {
  const total = (read) => snapshot.variants.reduce((sum, variant) => sum + (read(variant) ?? 0), 0);
  const cheapest = report?.variants.find((variant) => variant.cheapest);
  const slowest = Math.max(...snapshot.variants.map((variant) => variant.latency_ms?.p95 ?? 0));
  const cost = (name) => snapshot.variants.find((variant) => variant.name === name)?.cost?.per_million;
  const base = snapshot.variants[0]?.name;
  const told = [
    ["answered per second", number(total((variant) => variant.requests.per_s)), `${Math.round(total((v) => v.requests.total)).toLocaleString("en")} in all`],
    ["slowest p95", slowest ? `${number(slowest)} ms` : "–", "of a variant, last 10 s"],
    [`${snapshot.device.name} busy`, percent(snapshot.device.busy), `${snapshot.device.lanes} × ${snapshot.device.threads / snapshot.device.lanes} threads`],
  ];
  if (cheapest) told.push([`cheapest: ${cheapest.name}`, times(cheapest.gain), `the throughput of ${report.base}`]);
  if (snapshot.price_per_hour !== null && cheapest) {
    told.push(["per million answers", money(cost(cheapest.name), snapshot.currency), `${base}: ${money(cost(base), snapshot.currency)}`]);
  }
  return told;
}

function showTiles(told) {
  const list = find("#tiles");
  if (list.children.length !== told.length) {
    list.replaceChildren(...told.map(() => el("div", {}, el("dt"), el("dd", {}, el("b"), el("span")))));
  }
  told.forEach(([name, value, note], index) => {
    const tile = list.children[index];
    [["dt", name], ["b", value], ["span", note]].forEach(([tag, text]) => say(find(tag, tile), text));
  });
}

function showStatus(state, text) {
  const status = find("#status");
  status.className = `status ${state}`;
  say(find("span", status), text);
}

function askForKey(refused) {
  const notice = find("#notice");
  notice.hidden = false;
  say(notice, `This service asks for a key: ${refused.message}`);
}

function startKeys() {
  const dialog = find("#key-dialog");
  find("#key").addEventListener("click", () => dialog.showModal());
  find("#key-cancel").addEventListener("click", () => dialog.close());
  find("form", dialog).addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(find("#key-text").value);
    find("#key-text").value = "";
    find("#notice").hidden = true;
    dialog.close();
  });
  onRefused(askForKey);
}

/** Wait until the service has started; tell how far it is. */
async function started() {
  for (;;) {
    try {
      const [base, report] = await Promise.all([get("v1/base"), get("v1/report")]);
      return { base, report };
    } catch (refused) {
      const told = refused.status === 503 ? `starting: ${refused.message}` : refused.status ? refused.message : "no connection";
      showStatus(refused.status === 503 ? "starting" : "lost", told);
      await pause(AGAIN_MS);
    }
  }
}

let parts = [];
let shown = "";

/** Make the parts of the page anew where the service is another than before; a lost connection alone changes nothing. */
function adopt(context, names) {
  const told = JSON.stringify([context.base, context.report, names]);
  if (told === shown) return;
  shown = told;
  parts.forEach((part) => part.end?.());
  parts = partsOf({ ...context, variants: numbered(context.report, names) });
}

/** Show what the service tells, until the stream ends: by a restart, a reload or a drain. */
const follow = (context) => listen("v1/live/stream", (snapshot) => {
  adopt(context, snapshot.variants.map((variant) => variant.name));
  showStatus(snapshot.draining ? "starting" : "serving", snapshot.draining ? "draining" : "serving");
  showTiles(tiles(snapshot, context.report));
  parts.forEach((part) => part.update?.(snapshot));
});

function partsOf(context) {
  say(find("#model"), context.base.name);
  document.title = `${context.base.name} · leanserve`;
  showClaim(context.report);
  const waterfall = new Waterfall(find("#passes"), context);
  const table = new VariantTable(find("#variants table"), context, (name) => waterfall.show(name));
  table.choose(context.report?.variants.find((variant) => variant.cheapest)?.name ?? [...context.variants.keys()][0]);
  return [
    table,
    new TryIt(find("#try"), context),
    new Experiment(find("#experiment .experiment"), context),
    new History(find("#history"), context),
    new LatencyPlot(find("#latency > div"), context),
    new Tradeoff(find("#tradeoff"), context),
    waterfall,
  ];
}

async function run() {
  startTheme();
  startKeys();
  onTheme(() => parts.forEach((part) => part.recolour?.()));
  for (;;) {
    await follow(await started()).catch(() => {});
    showStatus("lost", "connecting again");
    await pause(AGAIN_MS);
  }
}

run();
