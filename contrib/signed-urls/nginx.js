// Signed URLs of Tollgate in nginx, by its module njs (libnginx-mod-http-js). With verify.mjs and url-keys.mjs beside it:
//
//     export default { 'the key id': 'the key, as export_url_key() returned it' }
//
// and in nginx.conf, for what is served below /files/:
//
//     js_path /etc/nginx/signed-urls;
//     js_import signed from nginx.js;
//     js_set $signed_url signed.code;
//     location /files/ {
//         if ($signed_url != VALID) { return 403 $signed_url; }
//         js_header_filter signed.pin;
//     }

import keys from 'url-keys.mjs'
import urls from 'verify.mjs'

// By an absolute request line nginx chooses a server whatever the header says (RFC 9112, section 3.2.2).
function isForThisHost(v) {
  return (
    (v.http_host || '')
      .toLowerCase()
      .replace(/:[0-9]*$/, '')
      .replace(/\.$/, '') === v.host
  )
}

function found(r) {
  const v = r.variables
  if (!isForThisHost(v)) return { code: 'MALFORMED' }
  return urls.verify(`${v.scheme}://${v.http_host}${v.request_uri}`, v.request_method, v.remote_addr, Date.now() / 1000, keys)
}

function code(r) {
  return found(r).code
}

// Sets the headers that were pinned.
function pin(r) {
  const headers = found(r).headers || {}
  Object.keys(headers).forEach((name) => {
    r.headersOut[name] = headers[name]
  })
}

export default { code, pin }
