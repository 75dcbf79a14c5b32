-- The tokens. Verification reads this table by column numbers (extension/src/store/probe.rs): columns are only ever
-- appended.

CREATE TABLE tollgate.api_tokens (
    id             uuid        NOT NULL CONSTRAINT api_tokens_pkey PRIMARY KEY,
    created_at     timestamptz NOT NULL DEFAULT now(),
    token_hash     bytea       NOT NULL CHECK (octet_length(token_hash) = 32),
    user_id        text        NOT NULL CHECK (length(user_id) BETWEEN 1 AND 255),
    name           text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    scopes         text[]      NOT NULL,
    metadata       jsonb       NOT NULL CHECK (jsonb_typeof(metadata) = 'object'),
    expires_at     timestamptz,
    disabled_at    timestamptz,
    revoked_at     timestamptz,
    rate_limit     integer     CHECK (rate_limit > 0),
    rate_window    interval    CHECK (rate_window > '0' AND rate_window <= '1 day'),
    allowed_ips    cidr[],
    quota_id       uuid,
    hint           text        NOT NULL,
    created_by     text        NOT NULL DEFAULT tollgate.acting_role(),
    expired_at     timestamptz,
    revoked_reason text,
    parent_id      uuid,
    rotated_from   uuid,
    rotated_to     uuid,
    disabled_via   uuid,
    announced_expiry timestamptz,
    foreign_hash   bytea       CHECK (octet_length(foreign_hash) = 32),
    foreign_format text        CHECK (foreign_hash IS NOT NULL OR foreign_format IS NULL),
    revoke_on_reuse boolean,
    reuse_detected_at timestamptz,
    disabled_with_user boolean NOT NULL DEFAULT false
) USING heap;
COMMENT ON TABLE tollgate.api_tokens IS 'API tokens, by the SHA-256 digest of their plaintext, which is not stored. Written only when a token is managed, never by verification';
COMMENT ON COLUMN tollgate.api_tokens.token_hash IS 'sha256 of the whole token; random while that is unknown, for a token imported in another format';
COMMENT ON COLUMN tollgate.api_tokens.foreign_hash IS 'For a token imported in a format other than sha256: a digest of the digest that it was imported by. It stays, so that the token is not imported a second time';
COMMENT ON COLUMN tollgate.api_tokens.foreign_format IS 'That format, until the token is first used and its token_hash is known; then NULL';
COMMENT ON COLUMN tollgate.api_tokens.revoke_on_reuse IS 'For a rotated token: whether its successors are revoked if it is presented after its grace';
COMMENT ON COLUMN tollgate.api_tokens.reuse_detected_at IS 'When its presentation after its grace was last recorded';
COMMENT ON COLUMN tollgate.api_tokens.quota_id IS 'The quota that it spends, with all that were rotated or derived from the token that it was set for';
COMMENT ON COLUMN tollgate.api_tokens.hint IS 'Prefix and first four characters, to recognise a token in a list';
COMMENT ON COLUMN tollgate.api_tokens.expired_at IS 'When the expiry was recorded in the audit log; the token ended at expires_at';
COMMENT ON COLUMN tollgate.api_tokens.parent_id IS 'The token that this one was derived from; never changes, and exists as long as this one';
COMMENT ON COLUMN tollgate.api_tokens.rotated_from IS 'The token that this one replaced, which may be purged';
COMMENT ON COLUMN tollgate.api_tokens.rotated_to IS 'The token that replaced this one; a token is rotated once';
COMMENT ON COLUMN tollgate.api_tokens.announced_expiry IS 'The expiry that announce_expiries has handled; another one is announced again';
COMMENT ON COLUMN tollgate.api_tokens.disabled_via IS 'The ancestor whose disabling disabled this token; NULL in a token that was disabled by itself';
COMMENT ON COLUMN tollgate.api_tokens.disabled_with_user IS 'Whether the token is disabled only because its user is inactive; it is enabled when the user is active again';

CREATE UNIQUE INDEX api_tokens_token_hash ON tollgate.api_tokens (token_hash);
CREATE UNIQUE INDEX api_tokens_foreign_hash ON tollgate.api_tokens (foreign_hash) WHERE foreign_hash IS NOT NULL;
CREATE INDEX api_tokens_foreign_format ON tollgate.api_tokens (foreign_format) WHERE foreign_format IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX api_tokens_user ON tollgate.api_tokens (user_id, id);
CREATE INDEX api_tokens_hint ON tollgate.api_tokens (hint, id);
CREATE INDEX api_tokens_live ON tollgate.api_tokens (user_id)
    WHERE revoked_at IS NULL AND rotated_to IS NULL AND expired_at IS NULL;
CREATE INDEX api_tokens_quota ON tollgate.api_tokens (quota_id) WHERE quota_id IS NOT NULL;
CREATE INDEX api_tokens_parent ON tollgate.api_tokens (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX api_tokens_expiring ON tollgate.api_tokens (expires_at, id)
    WHERE expires_at IS NOT NULL AND expired_at IS NULL AND revoked_at IS NULL;
CREATE INDEX api_tokens_unannounced ON tollgate.api_tokens (expires_at, id)
    WHERE expires_at IS NOT NULL AND expired_at IS NULL AND revoked_at IS NULL AND rotated_to IS NULL
      AND announced_expiry IS DISTINCT FROM expires_at;
CREATE INDEX api_tokens_ended ON tollgate.api_tokens (least(revoked_at, expires_at), id)
    WHERE revoked_at IS NOT NULL OR expired_at IS NOT NULL;
SELECT pg_extension_config_dump('tollgate.api_tokens', '');

CREATE TABLE tollgate.token_slots (
    user_hash bigint PRIMARY KEY
);
COMMENT ON TABLE tollgate.token_slots IS
    'One row per user who was issued a token under tollgate.max_tokens_per_user, to be locked while issuing: the beginning of the SHA-256 digest of the user_id. Not dumped';

-- The rows serve only as locks in this cluster.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.token_slots
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.token_slots ENABLE REPLICA TRIGGER leave_out;

CREATE TYPE tollgate.issued_token AS (
    id         uuid,
    token      text,
    hint       text,
    user_id    text,
    name       text,
    scopes     text[],
    expires_at timestamptz,
    created_at timestamptz
);
COMMENT ON TYPE tollgate.issued_token IS 'A newly issued token, at the only moment its plaintext exists';

CREATE TYPE tollgate.verification AS (
    valid          boolean,
    code           text,
    token_id       uuid,
    user_id        text,
    name           text,
    scopes         text[],
    expires_at     timestamptz,
    metadata       jsonb,
    rate_limit     integer,
    rate_remaining integer,
    retry_after    interval
);
COMMENT ON TYPE tollgate.verification IS
    'The outcome of a verification. For a refused token only token_id and expires_at are set, so that a caller that does not check valid gets no identity';
