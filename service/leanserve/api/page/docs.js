// The page at `/docs`: Swagger UI over the service's own `openapi.json`. With a key, where the service asks for one; it is
// sent with what is tried out, too, and kept nowhere.

const ask = document.querySelector("#ask");
let key = "";

async function show() {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch("openapi.json", { headers });
  const told = await reply.json();
  ask.hidden = reply.ok;
  document.querySelector("#said").textContent = reply.ok ? "" : told.error;
  if (!reply.ok) return;
  SwaggerUIBundle({
    spec: told,
    dom_id: "#api",
    validatorUrl: null,  // else it would show the document to a service on the internet
    requestInterceptor: (request) => {
      if (key) request.headers.Authorization = `Bearer ${key}`;
      return request;
    },
  });
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.querySelector("#key").value.trim();
  show();
});
show();
