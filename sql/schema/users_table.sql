-- The application's own table of users: whoever leaves it leaves no token behind.

CREATE FUNCTION tollgate.attach_users_table("table" regclass, key_column name) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind      "char";
    owner     oid;
    is_branch boolean;
    key_type  oid;
    attached  text;
    branch    regclass;
BEGIN
    SELECT c.relkind, c.relowner, c.relispartition INTO kind, owner, is_branch FROM pg_class c WHERE c.oid = $1;
    IF kind IS NULL OR kind NOT IN ('r', 'p') OR is_branch THEN
        RAISE EXCEPTION 'users are kept in an ordinary or a partitioned table'
            USING ERRCODE = 'wrong_object_type', DETAIL = format('Argument: table, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Attach the table that views show, or the whole of a partitioned table.';
    END IF;
    IF NOT pg_has_role(tollgate.acting_role(), owner, 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', $1
            USING ERRCODE = 'insufficient_privilege', DETAIL = 'Argument: table.',
                  HINT = 'Attaching a table puts triggers on it: let its owner do that.';
    END IF;
    -- A statement on one of them removes rows of the other, without a trigger of that one's. So do foreign servers.
    IF EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
               WHERE NOT c.relispartition AND (i.inhrelid = $1 OR i.inhparent = $1)) THEN
        RAISE EXCEPTION 'table % shares rows with another by inheritance', $1
            USING ERRCODE = 'wrong_object_type', DETAIL = 'Argument: table.',
                  HINT = 'Users are kept in a table that inherits from none and that none inherits from; partitions are fine.';
    END IF;
    IF EXISTS (SELECT FROM pg_partition_tree($1) p JOIN pg_class c ON c.oid = p.relid WHERE c.relkind = 'f') THEN
        RAISE EXCEPTION 'a partition of table % is on another server', $1
            USING ERRCODE = 'wrong_object_type', DETAIL = 'Argument: table.',
                  HINT = 'Rows may be deleted there without a trigger here. Revoke the tokens of their users with tollgate.revoke_all_api_tokens(user_id).';
    END IF;
    SELECT a.atttypid INTO key_type FROM pg_attribute a WHERE a.attrelid = $1 AND a.attname = $2 AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table % has no such column', $1
            USING ERRCODE = 'undefined_column', DETAIL = format('Argument: key_column, of %s.', tollgate.quote_redacted($2)),
                  HINT = 'Name the column whose text is the user_id of tokens.';
    END IF;
    PERFORM tollgate.check_key_type(key_type);
    PERFORM tollgate.check_key_is_stored($1, $2);

    -- Ends the transaction's wait for those who change users now, and keeps other attachments out.
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', $1);
    SELECT convert_from(substring(t.tgargs FROM 1 FOR length(t.tgargs) - 1), 'UTF8') INTO attached FROM pg_trigger t
        WHERE t.tgrelid = $1 AND t.tgname = 'tollgate_user_deleted';
    IF attached <> $2 THEN
        RAISE EXCEPTION 'table % is attached by another column', $1
            USING ERRCODE = 'duplicate_object', DETAIL = format('Argument: key_column, of %I; it is attached by %I.', $2, attached),
                  HINT = 'Drop the triggers tollgate_user_deleted, tollgate_user_changed and tollgate_users_truncated of the table first.';
    END IF;

    -- A partition may be written to directly, which the partitioned table's triggers for each statement do not see.
    IF kind = 'p' THEN
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE', 'FOR EACH ROW', $2);
    ELSE
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE',
                                        'REFERENCING OLD TABLE AS departed FOR EACH STATEMENT', $2);
    END IF;
    -- For each row, so that statements that change something else cost nothing.
    PERFORM tollgate.attach_trigger($1, 'tollgate_user_changed', 'AFTER UPDATE',
                                    format('FOR EACH ROW WHEN (OLD.%1$I IS DISTINCT FROM NEW.%1$I)', $2), $2);
    FOR branch IN SELECT $1 UNION SELECT p.relid FROM pg_partition_tree($1) p LOOP
        PERFORM tollgate.attach_trigger(branch, 'tollgate_users_truncated', 'BEFORE TRUNCATE', 'FOR EACH STATEMENT', $2);
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.attach_users_table(regclass, name) IS
    'Revokes the tokens of users who are deleted from a table, truncated away or given another key. Its owner alone may; the key is a uuid, an integer or a text, whose text is the user_id. Once more does what is missing, such as for new partitions, which TRUNCATE of one alone would else not reach';

CREATE FUNCTION tollgate.check_key_type(key_type oid) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Keys are read and compared with our rights. The operators and casts of these types are nobody's to define.
    IF $1 IS NULL OR $1::regtype <> ALL (ARRAY['uuid', 'smallint', 'integer', 'bigint', 'text', 'character varying']::regtype[]) THEN
        RAISE EXCEPTION 'the key of a users table is a uuid, an integer or a text'
            USING ERRCODE = 'datatype_mismatch', DETAIL = format('Argument: key_column, of type %s.', coalesce($1::regtype::text, 'unknown')),
                  HINT = 'Name the column whose text is the user_id of tokens.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_key_type(oid) IS 'Raises 42804 unless a type can be the key of a users table. Internal.';

CREATE FUNCTION tollgate.check_key_is_stored(users regclass, key_column name) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Since PostgreSQL 18. It is NULL in the rows that triggers are handed.
    IF EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = $1 AND a.attname = $2 AND a.attgenerated = 'v') THEN
        RAISE EXCEPTION 'the key of a users table must be stored'
            USING ERRCODE = 'wrong_object_type', DETAIL = format('Argument: key_column, of %I, which is a virtual generated column.', $2),
                  HINT = 'Name a column that it is computed from, or generate it STORED.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_key_is_stored(regclass, name) IS 'Raises 42809 for a virtual generated column. Internal.';

CREATE FUNCTION tollgate.attach_trigger(users regclass, trigger_name name, event text, firing text, key_column name) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = $1 AND t.tgname = $2) THEN
        EXECUTE format('CREATE TRIGGER %I %s ON %s %s EXECUTE FUNCTION tollgate.revoke_departed_users(%L)', $2, $3, $1, $4, $5);
        -- DROP EXTENSION takes it along, and leaves the table alone.
        EXECUTE format('ALTER TRIGGER %I ON %s DEPENDS ON EXTENSION tollgate', $2, $1);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.attach_trigger(regclass, name, text, text, name) IS
    'Puts a trigger of attach_users_table on a table, unless it is there. Internal.';

CREATE FUNCTION tollgate.query_as(role oid, query text, keys text[]) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'query_as';
COMMENT ON FUNCTION tollgate.query_as(oid, text, text[]) IS
    'What a query of the keys ($1) answers when it runs with the rights of a role. Internal.';

CREATE FUNCTION tollgate.revoke_if_departed(users regclass, key_column name, key_type oid, keys text[], operation text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    departed text[];
BEGIN
    SELECT tollgate.query_as(c.relowner, format('SELECT array_agg(d) FROM unnest($1) d WHERE NOT EXISTS (SELECT FROM %s u WHERE u.%I = d::%s)',
                                                $1, $2, $3::regtype), $4)
        INTO departed FROM pg_class c WHERE c.oid = $1;
    IF departed IS NULL THEN
        RETURN 0;
    END IF;
    RETURN tollgate.revoke_without_notification(departed,
        CASE $5 WHEN 'UPDATE' THEN 'the user has another key' ELSE 'the user was deleted' END,
        jsonb_build_object('users_table', $1));
END
$$;
COMMENT ON FUNCTION tollgate.revoke_if_departed(regclass, name, oid, text[], text) IS
    'Revokes the tokens of those of some users who are not in their table any more, and says how many. Internal.';

-- Runs with its owner's rights beside the table of somebody else, so what it reads of that it reads with the rights of the
-- table's owner, but for the keys that it is handed.
CREATE FUNCTION tollgate.revoke_departed_users() RETURNS trigger
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key_column name := TG_ARGV[0];
    -- Of a partition the whole table, where the user may be still, or again.
    users      regclass := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    key_type   oid := (SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = TG_RELID AND a.attname = key_column AND NOT a.attisdropped);
    departed   text[];
    one        text;
    keys       text[] := '{}';
    branch     record;
    page       bigint;
    affected   bigint := 0;
    n          bigint := 0;
BEGIN
    PERFORM tollgate.check_key_type(key_type);
    -- The column may be another since.
    PERFORM tollgate.check_key_is_stored(TG_RELID, key_column);
    IF TG_OP = 'TRUNCATE' THEN
        -- TRUNCATE removes rows that an old snapshot does not show.
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            RAISE EXCEPTION 'a users table cannot be truncated in a % transaction', current_setting('transaction_isolation')
                USING ERRCODE = 'invalid_transaction_state', DETAIL = format('The tokens of the users of %s are to be revoked.', users),
                      HINT = 'Truncate it in a transaction with isolation level READ COMMITTED.';
        END IF;
        -- Each table that is truncated has a trigger of its own, but for partitions that came after the attachment.
        -- A hundred pages at a time, some ten thousand users, as there may be any number.
        FOR branch IN SELECT c.oid, c.relowner, pg_relation_size(c.oid) / current_setting('block_size')::bigint AS pages FROM pg_class c
                      WHERE c.relkind = 'r' AND c.oid IN (SELECT TG_RELID UNION SELECT p.relid FROM pg_partition_tree(TG_RELID) p)
        LOOP
            FOR page IN SELECT generate_series(0, branch.pages, 100) LOOP
                departed := tollgate.query_as(branch.relowner, format(
                    'SELECT array_agg(DISTINCT u.%I::text COLLATE "C") FROM ONLY %s u WHERE u.ctid >= %L AND u.ctid < %L',
                    key_column, branch.oid::regclass, format('(%s,0)', page), format('(%s,0)', page + 100)), NULL);
                CONTINUE WHEN departed IS NULL;
                affected := affected + tollgate.revoke_without_notification(departed, 'the user was deleted', jsonb_build_object('users_table', users));
                n := n + cardinality(departed);
                one := departed[1];
            END LOOP;
        END LOOP;
    ELSIF TG_LEVEL = 'STATEMENT' THEN
        -- So many users at a time, since a statement may delete any number; their table may be read once for each turn. In the
        -- order in which their tokens are locked.
        FOR one IN EXECUTE format('SELECT DISTINCT d.%I::text COLLATE "C" FROM departed d ORDER BY 1', key_column) LOOP
            n := n + 1;
            keys := keys || one;
            IF cardinality(keys) >= 50000 THEN
                affected := affected + tollgate.revoke_if_departed(users, key_column, key_type, keys, TG_OP);
                keys := '{}';
            END IF;
        END LOOP;
        affected := affected + tollgate.revoke_if_departed(users, key_column, key_type, keys, TG_OP);
    ELSE
        n := 1;
        EXECUTE format('SELECT ($1).%I::text', key_column) INTO one USING OLD;
        affected := tollgate.revoke_if_departed(users, key_column, key_type, ARRAY[one], TG_OP);
    END IF;
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, CASE WHEN n = 1 THEN one END, NULL, affected);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_departed_users() IS
    'Trigger of the tables that attach_users_table was told of: revokes the tokens of users who are not in them any more. Internal: whoever may create a trigger with it may revoke anybody''s tokens.';
