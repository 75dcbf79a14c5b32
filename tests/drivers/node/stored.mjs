// stored.mjs: has better-auth make an API key, and prints the key and what it stores of it.
import { apiKey } from '@better-auth/api-key'
import { betterAuth } from 'better-auth'
import { memoryAdapter } from 'better-auth/adapters/memory'

const tables = { user: [], session: [], account: [], verification: [], apikey: [] }
const auth = betterAuth({
  secret: 'only for these tests, and long enough',
  baseURL: 'http://localhost',
  database: memoryAdapter(tables),
  emailAndPassword: { enabled: true },
  telemetry: { enabled: false },
  plugins: [apiKey()],
})
const account = { name: 'ann', email: 'ann@example.com', password: 'correct horse' }
const { user } = await auth.api.signUpEmail({ body: account })
const { key } = await auth.api.createApiKey({ body: { name: 'ci', userId: user.id, prefix: 'ba_' } })
console.log('better-auth', key, tables.apikey[0].key)
