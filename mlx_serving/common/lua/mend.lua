-- Quarantines keys that are not of the type that they should have: for commands that no script of ours sends.
-- ARGV: two prefixes, then for each key: its name, its type.
-- Returns an empty list.
for at = 3, #ARGV, 2 do
  local key, kind = ARGV[at], ARGV[at + 1]
  local found = redis.call('TYPE', key).ok
  local problem = found ~= 'none' and found ~= kind and quarantine(key)
  if problem then raise(problem) end
end
return answer({})
