// Browsers start no worker for a page that was opened from a file. There the theme's search runs in a hidden frame, which
// is spoken to as a worker is.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = Object.assign(document.createElement("iframe"), { hidden: true })
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise((done) => (this.inside.ready = done))
      this.inside.document.write(
        `<script>postMessage = answer</script><script src="${url}"></script><script>ready()</script>`,
      )
      this.inside.document.close()
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
