// issuer.mjs oidc-provider|oauth2-mock-server: an identity provider on a free port of this machine.
//
// Prints its issuer. Then each line of standard input is answered by one line: `token` by an access token for AUDIENCE with the
// scope posts:read, `rotate` by the kid of the key that signs from now on. What is printed for the tests begins with "> ".
import { generateKeyPairSync, randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:http'
import { createInterface } from 'node:readline'

// It says that it is set up for development alone, as it is.
console.info = console.warn = () => {}

const AUDIENCE = 'https://api.test'
const SCOPE = 'posts:read'

async function oidcProvider() {
  const { Provider } = await import('oidc-provider')
  let provider
  const server = createServer((request, response) => provider.callback()(request, response))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const issuer = `http://127.0.0.1:${server.address().port}`
  const secret = randomUUID()

  function rotate() {
    const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const kid = randomUUID()
    provider = new Provider(issuer, {
      jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), kid, alg: 'ES256', use: 'sig' }] },
      clientDefaults: { id_token_signed_response_alg: 'ES256' },
      clients: [
        {
          client_id: 'robot',
          client_secret: secret,
          grant_types: ['client_credentials'],
          redirect_uris: [],
          response_types: [],
        },
      ],
      features: {
        devInteractions: { enabled: false },
        clientCredentials: { enabled: true },
        resourceIndicators: {
          enabled: true,
          defaultResource: () => AUDIENCE,
          getResourceServerInfo: () => ({
            scope: SCOPE,
            audience: AUDIENCE,
            accessTokenTTL: 600,
            accessTokenFormat: 'jwt',
            jwt: { sign: { alg: 'ES256' } },
          }),
        },
      },
    })
    return kid
  }

  async function token() {
    const answer = await fetch(`${issuer}/token`, {
      method: 'POST',
      headers: { authorization: `Basic ${Buffer.from(`robot:${secret}`).toString('base64')}` },
      body: new URLSearchParams({ grant_type: 'client_credentials', scope: SCOPE }),
    })
    const body = await answer.json()
    return body.access_token ?? JSON.stringify(body)
  }

  rotate()
  return { issuer, rotate, token }
}

async function mockServer() {
  const { OAuth2Server } = await import('oauth2-mock-server')
  const server = new OAuth2Server()
  let kid

  async function rotate() {
    // Its own kids have 80 hexadecimal digits, as the secret part of a token of ours, and so are refused.
    kid = randomUUID()
    await server.issuer.keys.generate('RS256', { kid })
    return kid
  }

  await rotate()
  await server.start(0, '127.0.0.1')

  function token() {
    const claims = { sub: 'robot', aud: [AUDIENCE], scope: SCOPE }
    return server.issuer.buildToken({ kid, scopesOrTransform: (_header, payload) => Object.assign(payload, claims) })
  }

  return { issuer: server.issuer.url, rotate, token }
}

const kinds = { 'oidc-provider': oidcProvider, 'oauth2-mock-server': mockServer }
const running = await kinds[process.argv[2]]()
console.log(`> ${running.issuer}`)
for await (const line of createInterface({ input: process.stdin })) {
  console.log(`> ${await running[line]()}`)
}
process.exit()
