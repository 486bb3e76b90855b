// The site's search runs in a Worker, which browsers refuse to pages opened from disk. There, a hidden frame takes its
// place: the same script runs in it, and messages are handed over by calls. (Material looks for this name.)
"use strict";
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => this.load(next)), Promise.resolve());
      this.ready = this.load(url);
      this.addEventListener("message", (event) => this.onmessage?.(event));
    }
    load(src) {
      return new Promise((done, fail) => {
        const script = this.inside.document.createElement("script");
        Object.assign(script, { src, onload: done, onerror: () => fail(new Error("cannot read " + src)) });
        this.inside.document.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.inside.frameElement.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
