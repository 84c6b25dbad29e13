// Where numbers come from: the server that runs the library, or what `deltaw lab --export` recorded.

export const recorded = document.querySelector('meta[name="lab"]').content === "recorded";

async function json(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The lab does not answer: is it still running?");
  }
  let body = null;
  try { body = await response.json(); } catch { body = {}; }
  if (!response.ok) {
    const why = typeof body.detail === "string" ? body.detail : `the lab answered ${response.status}`;
    throw new Error(recorded ? "This position was not recorded." : why);
  }
  return body;
}

export const frames = () => json(recorded ? "data/pictures.json" : "api/pictures");

// The numbers and data of a picture at `state`; `act`: let the server change something first (train, answer).
export function picture(frame, state, { act = false, signal } = {}) {
  if (recorded) {
    const at = frame.controls.map((c) => c.recorded.findIndex((v) => String(v) === String(state[c.name])));
    return json(`data/${frame.number}/${at.join("-")}.json`, { signal });
  }
  if (act) {
    const headers = { "content-type": "application/json" };
    return json(`api/pictures/${frame.number}`, { method: "POST", headers, body: JSON.stringify(state), signal });
  }
  return json(`api/pictures/${frame.number}?${new URLSearchParams(state)}`, { signal });
}
