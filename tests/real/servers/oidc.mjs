// The OAuth2 server of the tests: one client with client credentials, access tokens as RS256 JWTs for the audience that
// the request's `resource` names (RFC 8707). Started by oidc.sh.
import { readFileSync, writeFileSync } from 'node:fs';
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import Provider from 'oidc-provider';

const { PORT, STATE, CLIENT_SECRET, AUDIENCE, ROTATE, TTL } = process.env;
const file = `${STATE}/keys.json`;

let keys = [];
try { keys = JSON.parse(readFileSync(file, 'utf8')); } catch { /* the first start */ }
if (!keys.length || ROTATE) {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  // The first key of the set signs.
  keys.unshift({ ...privateKey.export({ format: 'jwk' }), kid: randomUUID(), use: 'sig', alg: 'RS256' });
  writeFileSync(file, JSON.stringify(keys), { mode: 0o600 });
}

const client = (client_id) => ({
  client_id, client_secret: CLIENT_SECRET, grant_types: ['client_credentials'], redirect_uris: [], response_types: [],
  scope: 'publish read operate',
});
const provider = new Provider(`http://127.0.0.1:${PORT}`, {
  clients: [client('n8n'), client('short-lived')],
  jwks: { keys },
  scopes: ['publish', 'read', 'operate'],
  // Pulsar's own tokens are to run out while a test lasts.
  ttl: { ClientCredentials: (_ctx, _token, { clientId }) => (clientId === 'short-lived' ? 5 : Number(TTL)) },
  // Pulsar wants `nbf`, which RFC 9068 leaves open.
  formats: { customizers: { jwt: (_ctx, _token, jwt) => { jwt.payload.nbf = jwt.payload.iat; } } },
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => `urn:${AUDIENCE}`,
      getResourceServerInfo: (_ctx, resource) => ({
        scope: 'publish read operate', audience: resource.replace(/^urn:/, ''), accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
  // What `tenants_claim` of the appliance reads.
  extraTokenClaims: () => ({ tenants: ['acme', 'default'] }),
});
provider.listen(Number(PORT), '127.0.0.1');
